"""Denoisers that are right by construction: the planted model told as another kind, and exact ones of a few latents.

With these a check of denoisers can be asked about several families: the shipped model predicts v; `Told` reads the same
trained weights as noise; `Exact` is the posterior mean of equally likely latents under the discrete schedule, told as
noise, v or the clean latent; `ExactFlow` the same under flow matching with captions, told as a velocity or wrongly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memscan.config import GeneratorConfig
from memscan.models.adapters import Adapter
from memscan.models.checkpoint import Checkpoint
from memscan.models.generator import Generator
from memscan.models.sanity import Sanity, check_generator
from memscan.models.schedulers import make_scheduler
from memscan.models.stock import StockGenerator
from memscan.planted.world import shipped_world, world_config
from memscan.sources.reading import open_source
from memscan.sources.sample import Example, examples

CAPTIONS = ["a red cup on a table", "two green boats"]


class Exact(nn.Module):
    """The posterior mean of equally likely latents given x_t, told as noise, v or the clean latent."""

    def __init__(self, like: Any, latents_KCHW: Tensor, schedule: dict[str, Any], says: str) -> None:
        super().__init__()
        self.config, self.says = like.config, says
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.latents_KCHW = latents_KCHW
        self.table = make_scheduler("DDIMScheduler", schedule, where="here").alphas_cumprod.double()
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> tuple[Tensor]:
        a = float(self.table[int(t.reshape(-1)[0])])
        far = (x[:, None] - a**0.5 * self.latents_KCHW[None]).square().sum(dim=(2, 3, 4))
        share = torch.softmax(-far.double() / (2 * (1 - a)), dim=1).float()
        clean = torch.einsum("bk,kchw->bchw", share, self.latents_KCHW)
        noise = (x - a**0.5 * clean) / (1 - a) ** 0.5
        told = {"epsilon": noise, "v_prediction": a**0.5 * noise - (1 - a) ** 0.5 * clean, "sample": clean}
        return (told[self.says],)


@dataclass(frozen=True)
class World:
    checkpoint: Checkpoint
    references: list[Example]
    latents_KCHW: Tensor

    def checked(self, checkpoint: Checkpoint, references: bool = True, **settings: Any) -> Sanity:
        config = GeneratorConfig(**({"path": checkpoint.where, "steps": 10, "guidance": 2.0} | settings))
        shown = self.references if references else []
        return check_generator(
            Generator(checkpoint, config), CAPTIONS, [image for image, _ in shown], [words for _, words in shown]
        )

    def exact(self, says: str, named: str | None = None) -> Checkpoint:
        schedule = self.checkpoint.scheduler_config | {"prediction_type": named or says}
        unet = Exact(self.checkpoint.unet, self.latents_KCHW, schedule | {"prediction_type": "epsilon"}, says)
        return replace(self.checkpoint, unet=unet, scheduler_config=schedule)

    def changed(self, part: str, change: Callable[[Any], Any]) -> Checkpoint:
        network = copy.deepcopy(getattr(self.checkpoint, part))
        with torch.no_grad():
            change(network)
        return replace(self.checkpoint, **{part: network})

    def scheduled(self, **changes: Any) -> Checkpoint:
        return replace(self.checkpoint, scheduler_config=self.checkpoint.scheduler_config | changes)


def load_world() -> World:
    """The shipped model, eight references, and their latents."""
    generator = Generator.load(world_config().generator)
    references = examples(open_source(str(shipped_world() / "references.parquet")), 8)
    pixels = np.stack([image for image, _ in references])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        latents = generator.checkpoint.vae.encode(images).latent_dist.mean
    return World(generator.checkpoint, references, latents.clone())


class Told(nn.Module):
    """Trained weights that predict v, told as noise: eps = sqrt(a) v + sqrt(1 - a) x."""

    def __init__(self, unet: Any, schedule: dict[str, Any]) -> None:
        super().__init__()
        self.unet, self.config = unet, unet.config
        self.table = make_scheduler("DDIMScheduler", schedule, where="here").alphas_cumprod.double().numpy()
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        level = float(torch.as_tensor(t).reshape(-1)[0])
        a = float(np.interp(level, np.arange(len(self.table)), self.table))
        kwargs["return_dict"] = False
        return (a**0.5 * self.unet(x, t, *args, **kwargs)[0] + (1 - a) ** 0.5 * x,)


class ExactFlow(nn.Module):
    """The posterior mean of equally likely latents given x = (1 - s) z + s eps, told as what `says` says."""

    def __init__(self, latents_KCHW: Tensor, says: str) -> None:
        super().__init__()
        self.says, self.latents_KCHW = says, latents_KCHW
        _, channels, size, _ = latents_KCHW.shape
        self.config = SimpleNamespace(
            in_channels=channels, sample_size=size, patch_size=1, joint_attention_dim=32, guidance_embeds=False
        )
        self.config.get = lambda key, default=None: getattr(self.config, key, default)
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor]:
        x, s = hidden_states, max(float(timestep.reshape(-1)[0]) / 1000, 1e-3)
        far = (x[:, None] - (1 - s) * self.latents_KCHW[None]).square().sum(dim=(2, 3, 4))
        # A caption makes one of them far likelier than the others.
        wanted = (encoder_hidden_states.double().abs().sum(dim=(1, 2)) * 1e3).long() % len(self.latents_KCHW)
        prior = 50.0 * torch.nn.functional.one_hot(wanted, len(self.latents_KCHW))
        share = torch.softmax(prior - far.double() / (2 * s * s), dim=1).float()
        clean = torch.einsum("bk,kchw->bchw", share, self.latents_KCHW)
        noise = (x - (1 - s) * clean) / s
        mixed = torch.randperm(clean[0].numel(), generator=torch.Generator().manual_seed(0))
        told = {
            "velocity": noise - clean,
            "backwards": clean - noise,
            "epsilon": noise,
            "sample": clean,
            "nothing": torch.zeros_like(x),
            "shuffled": (noise - clean).flatten(1)[:, mixed].view_as(x),
            "nan": torch.full_like(x, float("nan")),
            "overflow": ((noise - clean) * 1e6).half().float(),
        }
        return (told[self.says],)


def flow_generator(world: World, says: str, vae: Any = None, scheduler: Any = None, **settings: Any) -> StockGenerator:
    """Stable Diffusion 3's pipeline around an exact denoiser and the planted model's autoencoder."""
    import tempfile
    from pathlib import Path

    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    from tests.support.stock_models import clip_config
    from tests.support.tiny_world import save_tokenizer

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = save_tokenizer(Path(folder) / "tokenizer")
    encoders = [CLIPTextModelWithProjection(clip_config(tokenizer)).eval() for _ in range(2)]
    vae = copy.deepcopy(vae or world.checkpoint.vae)
    vae.register_to_config(shift_factor=0.0)
    pipeline = StableDiffusion3Pipeline(
        transformer=ExactFlow(world.latents_KCHW, says),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    adapter = Adapter("stock", "StableDiffusion3Pipeline", type(pipeline.scheduler).__name__, (), False, "velocity")
    rule = GeneratorConfig(**({"path": "flow", "steps": 10, "guidance": 4.0} | settings))
    return StockGenerator(pipeline, rule, adapter)


def zeroed(network: Any) -> None:
    for parameter in network.parameters():
        parameter.zero_()


def shuffled(network: Any) -> None:
    order = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        values = parameter.flatten()[torch.randperm(parameter.numel(), generator=order)]
        parameter.copy_(values.view_as(parameter))


def diverged(network: Any) -> None:
    next(network.parameters()).fill_(float("nan"))


def overflowing(network: Any) -> None:
    for parameter in network.parameters():
        parameter.mul_(1e30)
