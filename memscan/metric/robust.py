"""This module is the variant `robust` of FB-Mem.

It compares structure instead of pixels, at the best alignment.

`region` asks whether pixels are equal in place; a copy that was moved, enlarged, recoloured, compressed or partly
covered is not a copy to it. Here an image is a 64 x 64 grid of cells, each described by its edges:

* **Description.** The colour gradient's structure tensor (Di Zenzo 1986) does not change when colours are turned or
  inverted. Its strength and orientation (second and fourth harmonic, without sign) are averaged inside the region,
  away from its border, and divided by their strength in the neighbourhood: brightness and contrast go.
* **Alignment.** Every shift by up to a seventh of the side and five scales (0.9 to 1.11) are tried at once by FFT, for
  whole, foreground and background each on its own. With f the descriptions and w the regions' weights the score of a
  shift is the Dice coefficient 2 sum(w_a w_b f_a f_b) / sum(w_a w_b (|f_a|^2 + |f_b|^2)), less a little for the
  distance. The foreground also pays half for what one image has and the other has not; what an object hides of the
  background does not count.
* **Trimming.** At the best place the coefficient is taken again cell by cell, and the worst 30 % of the structure are
  left out: a bar across an object does not make it another one.

A region without structure (one plain colour) matches everything and proves nothing: it has no score of its own but
takes the other region's, as far as the outlines agree. docs/metric.md says what each term gains and costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from memscan.io import images
from memscan.metric.fbmem import FbMem, RegionScores, region_scores
from memscan.metric.regions import Image, Mask

GRID = 64  # cells a side
REACH = 9  # largest shift, in cells
SCALES = (0.9, 0.95, 1.0, 1 / 0.95, 1 / 0.9)
TRIMMED = 0.3  # share of the structure that may differ
UNMATCHED = 0.5  # what the foreground pays for structure that the other image has not
CONTRAST_FLOOR = 0.02  # gradient per cell that counts as structure; JPEG noise of quality 30 lies at about 0.01
FLAT = 0.04  # mean squared description under which a region has no structure
LEAST_CELLS = 16  # cells inside both regions under which they are not compared

_SMOOTHING = 0.75  # of the image before its gradient, in cells
_POOLING = 1.0  # of the edges, in cells
_NEIGHBOURHOOD = 4.0  # that a description is normalised by, in cells
_LOCAL = 2.0  # of the coefficient before trimming, in cells
_EDGE = 0.8  # a cell counts from this share of its region: edges of the outline belong to neither
_FIELD = GRID + 16  # of the FFT: shifts up to 15 do not wrap round
_SHIFT_PRICE, _SCALE_PRICE = 0.05 / 64, 0.02  # per squared cell, per step


@dataclass(frozen=True)
class PreparedStructure:
    """This describes an image at every scale; regions are whole, foreground, background.

    Attributes:
        cells_KRCHW: 5 channels w f, then w |f|^2, then w; float32.
        spectra_KRCHW: their Fourier transforms on the padded field; complex64.
        foreground_area: mean of the mask, in [0, 1]; None if the image has none of its own.
        edges_1EHW: what `_edges` gave, kept where another image's mask may be laid on this one.
        share_11HW: the blurred mask on the canvas, kept where it may be laid on another image.
    """

    cells_KRCHW: Tensor
    spectra_KRCHW: Tensor
    foreground_area: float | None
    edges_1EHW: Tensor | None = None
    share_11HW: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """This is the memory that is held: 4.3 MiB.

        Under the reference's mask it is 0.4 MiB more on a canvas of 128, and 6.3 MiB more on one of 512.
        """
        tensors = (self.cells_KRCHW, self.spectra_KRCHW, self.edges_1EHW, self.share_11HW)
        return sum(t.element_size() * t.nelement() for t in tensors if t is not None)


@dataclass(frozen=True)
class _Alignment:
    """Best place of each candidate's regions, (N, R): scale step, shift in cells, cells in both regions, outlines."""

    scale_NR: Tensor
    dy_NR: Tensor
    dx_NR: Tensor
    cells_NR: Tensor
    outline_NR: Tensor


class RobustFbMem(FbMem[PreparedStructure]):
    """This is the metric on aligned structure. Labels and matching are those of `FbMem`."""

    def prepare(self, image_HWC: Image, mask_HW: Mask | None) -> PreparedStructure:
        """Describe the image's cells at every scale; arguments and errors as `FbMem.prepare`."""
        mask = self._checked(image_HWC, mask_HW)
        side = self.config.canvas
        canvas = torch.from_numpy(images.resize(image_HWC, (side, side))).to(self.device)
        edges_1EHW = _edges(canvas.permute(2, 0, 1)[None].float().div_(255), side // GRID)
        whole = _at_all_scales(_normalised(edges_1EHW, torch.ones_like(edges_1EHW[:, :1]), side // GRID))
        if mask is None:
            return PreparedStructure(*whole, None, edges_1EHW)
        mask_11HW = torch.from_numpy(mask).to(self.device)[None, None]
        mask_11HW = functional.interpolate(mask_11HW, (side, side), mode="bilinear", antialias=True).clamp_(0, 1)
        share_11HW = _blur(mask_11HW, float(side // GRID))
        described = _with_regions(whole, edges_1EHW, share_11HW)
        kept = (edges_1EHW, share_11HW) if self.config.masks == "reference" else (None, None)
        return PreparedStructure(*described, float(mask.mean(dtype="float64")), *kept)

    def _cut_as(self, generated: PreparedStructure, reference: PreparedStructure) -> PreparedStructure:
        """Return the generated image with its regions cut by the reference's mask."""
        assert generated.edges_1EHW is not None
        assert reference.share_11HW is not None
        whole = generated.cells_KRCHW[:, :1], generated.spectra_KRCHW[:, :1]
        described = _with_regions(whole, generated.edges_1EHW, reference.share_11HW)
        return PreparedStructure(*described, reference.foreground_area)

    def score(self, generated: PreparedStructure, references: Sequence[PreparedStructure]) -> list[RegionScores]:
        """Return the scores of one generated image against each reference, in their order.

        A region under `degenerate_area` of either image, or with too few cells inside both, has no score of its own and
        takes the other's; so does a region without structure, but no more of it than the outlines agree.
        """
        if not references:
            return []
        if self.config.masks == "reference":
            cut = [self._cut_as(generated, reference) for reference in references]
            return [self._scored(a, b, _align(a, [b]), 0) for a, b in zip(cut, references, strict=True)]
        found = _align(generated, references)
        return [self._scored(generated, reference, found, n) for n, reference in enumerate(references)]

    def maps(self, generated: PreparedStructure, reference: PreparedStructure) -> dict[str, Tensor]:
        """Return the local Dice coefficient of foreground and background, each at its best alignment."""
        if self.config.masks == "reference":
            generated = self._cut_as(generated, reference)
        found = _align(generated, [reference])
        titles = {"foreground structure, aligned": 1, "background structure, aligned": 2}
        return {title: _local(generated, reference, found, 0, region)[0] for title, region in titles.items()}

    def _scored(
        self, generated: PreparedStructure, reference: PreparedStructure, found: _Alignment, n: int
    ) -> RegionScores:
        scores, blank = [], []
        for region in range(3):
            similarity_HW, structure_HW = _local(generated, reference, found, n, region)
            cells = float(found.cells_NR[n, region])
            blank.append(float(structure_HW.sum()) < FLAT * cells)
            scores.append(_trimmed(similarity_HW, structure_HW) if cells >= LEAST_CELLS else 0.0)
        areas = [area for area in (generated.foreground_area, reference.foreground_area) if area is not None]
        smallest, largest = min(areas), max(areas)
        few = [float(found.cells_NR[n, region]) < LEAST_CELLS for region in range(3)]
        small = (
            few[1] or smallest < self.config.degenerate_area,
            few[2] or 1 - largest < self.config.degenerate_area,
        )
        whole, foreground, background = scores
        plain = ""
        if blank[1] and not blank[2] and not any(small):
            foreground, plain = min(background, float(found.outline_NR[n, 1])), "foreground"
        elif blank[2] and not blank[1] and not any(small):
            background, plain = min(foreground, float(found.outline_NR[n, 2])), "background"
        result = region_scores(whole, foreground, background, *small, smallest, 1 - largest)
        return replace(result, copied=(plain,)) if plain else result


def _with_regions(whole: tuple[Tensor, Tensor], edges_1EHW: Tensor, share_11HW: Tensor) -> tuple[Tensor, Tensor]:
    """Cells (K, R, C, 64, 64) and their spectra of whole, foreground and background: w f (5 channels), w |f|^2, w."""
    cell = edges_1EHW.shape[-1] // GRID
    weights = (_inside(share_11HW), _inside(1 - share_11HW))
    cells, spectra = _at_all_scales(torch.cat([_normalised(edges_1EHW, weight, cell) for weight in weights]))
    return torch.cat([whole[0], cells], dim=1), torch.cat([whole[1], spectra], dim=1)


def _at_all_scales(cells_RCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Cells at every scale (K, R, C, 64, 64), and their Fourier transforms on the padded field."""
    # Half of each scale step goes to either image of a pair, so that exchanging them changes nothing.
    cells = torch.stack([_zoomed(cells_RCHW, scale**0.5) for scale in SCALES])
    return cells, torch.fft.rfft2(cells, s=(_FIELD, _FIELD))


def _inside(share: Tensor) -> Tensor:
    return ((share - _EDGE) / (1 - _EDGE)).clamp(min=0)


def _edges(canvas_1CHW: Tensor, cell: int) -> Tensor:
    """Strength of the colour gradient times (cos 2t, sin 2t, cos 4t, sin 4t, 1), t its orientation; per cell."""
    smooth = functional.pad(_blur(canvas_1CHW, _SMOOTHING * cell), (1, 1, 1, 1), mode="replicate")
    right = (smooth[..., 1:-1, 2:] - smooth[..., 1:-1, :-2]) * (cell / 2)
    down = (smooth[..., 2:, 1:-1] - smooth[..., :-2, 1:-1]) * (cell / 2)
    xx, yy, xy = (right * right).mean(1), (down * down).mean(1), (right * down).mean(1)
    strength = torch.sqrt(xx + yy + 1e-12)
    length = torch.sqrt((xx - yy) ** 2 + 4 * xy**2) + 1e-12
    oriented = strength * (length / (xx + yy + 1e-12)).clamp(max=1)
    cos2, sin2 = (xx - yy) / length, 2 * xy / length
    cos4, sin4 = cos2 * cos2 - sin2 * sin2, 2 * cos2 * sin2
    return torch.stack([oriented * cos2, oriented * sin2, oriented * cos4, oriented * sin4, strength], dim=1)


def _normalised(edges_1EHW: Tensor, weight_11HW: Tensor, cell: int) -> Tensor:
    """Edges averaged inside a region and divided by their strength in the neighbourhood, (1, 7, 64, 64)."""
    weight = functional.avg_pool2d(weight_11HW, cell)
    pooled = _blur(functional.avg_pool2d(edges_1EHW * weight_11HW, cell), _POOLING)
    mean = pooled / (_blur(weight, _POOLING) + 1e-3)
    around = _blur(weight, _NEIGHBOURHOOD) + 1e-3
    # Strength counts by where it is, not by how much there is of it: unrelated textures both have some everywhere.
    usual = _blur(mean[:, 4:] * weight, _NEIGHBOURHOOD) / around
    centred = torch.cat([mean[:, :4], mean[:, 4:] - usual], dim=1)
    energy = (centred * centred).sum(1, keepdim=True)
    contrast = torch.sqrt(_blur(energy * weight, _NEIGHBOURHOOD) / around + CONTRAST_FLOOR**2)
    f = centred / contrast
    return torch.cat([f * weight, (f * f).sum(1, keepdim=True) * weight, weight], dim=1)


def _align(generated: PreparedStructure, references: Sequence[PreparedStructure]) -> _Alignment:
    """Search all shifts at all scales for the best Dice coefficient of every region."""
    best: Tensor | None = None
    for step in range(len(SCALES)):
        own = generated.spectra_KRCHW[step]
        other = torch.stack([reference.spectra_KRCHW[-1 - step] for reference in references])
        cross = own.conj() * other
        energy = own[:, 5].conj() * other[:, :, 6] + own[:, 6].conj() * other[:, :, 5]
        # (N, R, 3): numerator, energy inside both regions, cells inside both.
        sums = torch.stack([cross[:, :, :5].sum(2), energy, cross[:, :, 6]], dim=2)
        numerator, inside, cells = _near(torch.fft.irfft2(sums, s=(_FIELD, _FIELD))).unbind(2)
        totals = _totals(generated, step)[None] + torch.stack([_totals(r, -1 - step) for r in references])
        least = torch.minimum(
            generated.cells_KRCHW[step, :, 6].sum((-1, -2))[None],
            torch.stack([reference.cells_KRCHW[-1 - step, :, 6].sum((-1, -2)) for reference in references]),
        )
        price_R = numerator.new_tensor([0.0, UNMATCHED, 0.0]).view(1, 3, 1, 1)
        denominator = ((1 - price_R) * inside.clamp(min=0) + price_R * totals[:, :, 0, None, None]) / 2
        score = numerator / (denominator + 1e-2) * _price(step, numerator.device)
        score = torch.where(cells >= least[..., None, None] / 2, score, torch.full_like(score, -2.0))
        top, at = score.flatten(2).max(2)
        shared = cells.flatten(2).gather(2, at[..., None])[..., 0]
        outline = shared / (totals[:, :, 1] - shared).clamp(min=1e-6)
        found = torch.stack([top, torch.full_like(top, step), at.to(top.dtype), shared, outline])
        best = found if best is None else torch.where(found[0] > best[0], found, best)
    assert best is not None
    width = 2 * REACH + 1
    shift = best[2].long()
    return _Alignment(best[1].long(), shift // width - REACH, shift % width - REACH, best[3], best[4].clamp(max=1))


def _totals(image: PreparedStructure, step: int) -> Tensor:
    """Return all the structure an image has of each region, and its cells by squared weight: (R, 2).

    Squared, because the outlines' agreement is Tanimoto's: soft borders of one and the same mask agree wholly.
    """
    energy_RHW, weight_RHW = image.cells_KRCHW[step, :, 5], image.cells_KRCHW[step, :, 6]
    return torch.stack([(energy_RHW * weight_RHW).sum((-1, -2)), (weight_RHW * weight_RHW).sum((-1, -2))], dim=1)


def _near(field: Tensor) -> Tensor:
    """Return the shifts up to `REACH` of a correlation, (..., 19, 19), no shift in the middle."""
    middle: Tensor = torch.fft.fftshift(field, dim=(-2, -1))
    low, high = _FIELD // 2 - REACH, _FIELD // 2 + REACH + 1
    return middle[..., low:high, low:high]


@lru_cache(maxsize=32)
def _price(step: int, device: torch.device) -> Tensor:
    """Return what remains of a score at every shift of a scale step: near places are preferred."""
    axis = torch.arange(-REACH, REACH + 1, device=device, dtype=torch.float32)
    distance = (axis[:, None] ** 2 + axis[None] ** 2).clamp(max=128)
    dearer = _SCALE_PRICE * abs(step - len(SCALES) // 2)
    return torch.sub(1 - dearer, _SHIFT_PRICE * distance)


def _local(
    generated: PreparedStructure, reference: PreparedStructure, found: _Alignment, n: int, region: int
) -> tuple[Tensor, Tensor]:
    """Dice coefficient around every cell at the best alignment, and the structure it is taken over; (H, W) each."""
    step = int(found.scale_NR[n, region])
    pad = (REACH,) * 4
    own = functional.pad(generated.cells_KRCHW[step, region], pad)
    other = functional.pad(reference.cells_KRCHW[-1 - step, region], pad)
    other = torch.roll(other, (-int(found.dy_NR[n, region]), -int(found.dx_NR[n, region])), (1, 2))
    price = UNMATCHED if region == 1 else 0.0
    inside = own[5] * other[6] + own[6] * other[5]
    structure = ((1 - price) * inside + price * (own[5] * own[6] + other[5] * other[6])) / 2
    both = _blur(torch.stack([(own[:5] * other[:5]).sum(0), structure])[None], _LOCAL)[0]
    return (both[0] / both[1].clamp(min=1e-6)).clamp(0, 1), both[1]


def _trimmed(similarity_HW: Tensor, structure_HW: Tensor) -> float:
    """Return the mean similarity, weighted by structure, without the worst `TRIMMED` of it."""
    order = torch.argsort(similarity_HW.flatten())
    similarity, structure = similarity_HW.flatten()[order], structure_HW.flatten()[order]
    kept = structure * (structure.cumsum(0) > TRIMMED * structure.sum())
    return float(((similarity * kept).sum() / kept.sum().clamp(min=1e-6)).clamp(0, 1))


def _zoomed(cells_RCHW: Tensor, scale: float) -> Tensor:
    """Enlarged about the centre; what leaves the grid is lost, what enters is empty."""
    if scale == 1:
        return cells_RCHW
    matrix = cells_RCHW.new_tensor([[1 / scale, 0, 0], [0, 1 / scale, 0]]).expand(len(cells_RCHW), 2, 3)
    grid = functional.affine_grid(matrix, list(cells_RCHW.shape), align_corners=False)
    return functional.grid_sample(cells_RCHW, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blur(images_BCHW: Tensor, sigma: float) -> Tensor:
    """Gaussian filter; mirrored at the border."""
    kernel = _gaussian(sigma, images_BCHW.device)
    channels, reach = images_BCHW.shape[1], len(kernel) // 2
    padded = functional.pad(images_BCHW, (reach,) * 4, mode="reflect")
    rows = functional.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return functional.conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


@lru_cache(maxsize=64)
def _gaussian(sigma: float, device: torch.device) -> Tensor:
    reach = int(-(-3 * sigma // 1))
    kernel = torch.exp(-(torch.arange(-reach, reach + 1, device=device) ** 2) / (2 * sigma**2))
    return torch.div(kernel, kernel.sum())
