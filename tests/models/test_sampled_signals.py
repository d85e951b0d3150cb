"""Signals that a sampling has for nothing, against hooks on the stock pipeline, calls by hand and brute force."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from memscan.detection.sampled import AttentionHook, tiled_distances, tiled_similarity
from memscan.models.acceleration import Acceleration
from memscan.models.denoiser import first_input
from memscan.models.generator import Generator
from memscan.models.hooks import DifferenceMapHook, NoiseNormHook
from memscan.models.sampling import initial_latents

CAPTIONS = ["the cat on a mat", "a dog, naïve 猫", "the cat on a mat"]
SEEDS = [11, 2**62 + 5, 3]
ATTENDED = ("attention_entropy", "bright_ending")

Make = Callable[..., Generator]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of diffusers' own tensors in numpy functions
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]


class _Slow:
    """A processor that writes the probabilities out, as the first releases of diffusers had it, and keeps them."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        self.kept = kept

    def __call__(self, attn: Any, hidden: Any, encoder_hidden_states: Any = None, *_: Any, **__: Any) -> torch.Tensor:
        batch, positions, _ = hidden.shape
        width = attn.to_q.out_features // attn.heads

        def by_head(rows: torch.Tensor) -> torch.Tensor:
            return rows.reshape(batch, -1, attn.heads, width).transpose(1, 2)

        q, k, v = (
            by_head(attn.to_q(hidden)),
            by_head(attn.to_k(encoder_hidden_states)),
            by_head(attn.to_v(encoder_hidden_states)),
        )
        weights = torch.softmax(q @ k.transpose(2, 3) / width**0.5, dim=3)
        self.kept.append(weights)
        return attn.to_out[0]((weights @ v).transpose(1, 2).reshape(batch, positions, -1))


def slow_signals(generator: Generator) -> dict[str, list[float]]:
    """From every probability and prediction of the stock pipeline, in loops."""
    parts, calls = generator.checkpoint, []  # type: ignore[var-annotated]
    pipeline: Any = diffusers.StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=getattr(diffusers, generator.config.own_scheduler).from_config(parts.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    kept: list[torch.Tensor] = []
    before = dict(parts.unet.attn_processors)
    slow = {name: _Slow(kept) if ".attn2." in name else own for name, own in before.items()}

    def on_call(_module: Any, args: Any, _options: Any, output: Any) -> None:
        table, t, x = pipeline.scheduler.alphas_cumprod, int(args[1]), args[0]
        found = output[0]
        if parts.scheduler_config["prediction_type"] == "v_prediction":
            found = table[t] ** 0.5 * found + (1 - table[t]) ** 0.5 * x
        calls.append((list(kept), found.double()))
        kept.clear()

    hook = parts.unet.register_forward_hook(on_call, with_kwargs=True)
    parts.unet.set_attn_processor(slow)
    try:
        noise, _ = initial_latents(SEEDS, generator.latent_shape)
        rule = generator.config
        pipeline(prompt=CAPTIONS, num_inference_steps=rule.steps, guidance_scale=rule.guidance, latents=noise)
    finally:
        hook.remove()
        parts.unet.set_attn_processor(before)
    ids = parts.tokenizer(CAPTIONS, padding="max_length", max_length=parts.max_tokens, truncation=True).input_ids
    found: dict[str, list[float]] = {name: [] for name in ATTENDED}
    for row, tokens in enumerate(ids):
        entropies = []
        for layers, _ in calls[-10:]:
            for weights in layers:
                shares = weights[len(CAPTIONS) + row].double().mean(dim=(0, 1))
                entropies.append(-float((shares * shares.log()).sum()))
        found["attention_entropy"].append(float(np.mean(entropies)))
        end, side = tokens.index(parts.tokenizer.eos_token_id), generator.latent_shape[1]
        maps = []
        for weights in calls[-1][0][:2]:
            looked = weights[len(CAPTIONS) + row, :, :, end].mean(dim=0)
            small = round(len(looked) ** 0.5)
            grid = looked.reshape(1, 1, small, small)
            maps.append(torch.nn.functional.interpolate(grid, (side, side), mode="bilinear")[0, 0])
        mask = torch.stack(maps).mean(dim=0).double()
        norms = [((eps[len(CAPTIONS) + row] - eps[row]) * mask).norm() for _, eps in calls]
        found["bright_ending"].append(float(torch.stack(norms).mean() / mask.mean()))
    return found


def with_attention(generator: Generator, acceleration: Acceleration | None = None) -> Generator:
    made = Generator(generator.checkpoint, generator.config, acceleration=acceleration)
    made.hooks = (*made.hooks, AttentionHook(generator.checkpoint.unet))
    return made


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("settings", [{"steps": 12}, {"steps": 3}, {"steps": 4, "scheduler": "PNDMScheduler"}], ids=str)
def test_attention_signals_are_those_of_slow_hooks(make_generator: Make, prediction_type: str, settings: Any) -> None:
    """Also over more steps than the entropy takes, over fewer, and with a scheduler of more calls than steps."""
    generator = with_attention(make_generator(prediction_type, **settings))
    signals = generator.generate(CAPTIONS, SEEDS).signals
    slow = slow_signals(generator)
    for name in ATTENDED:
        assert np.std(slow[name]) > 0
        np.testing.assert_allclose(signals[name], slow[name], rtol=2e-3)


def test_looking_changes_no_image_and_leaves_nothing_behind(make_generator: Make) -> None:
    plain = make_generator(steps=12)
    looked = with_attention(plain)
    np.testing.assert_array_equal(
        looked.generate(CAPTIONS, SEEDS).images_BHWC, plain.generate(CAPTIONS, SEEDS).images_BHWC
    )
    assert not any(module._forward_pre_hooks for module in plain.checkpoint.unet.modules())


@pytest.mark.parametrize(
    "acceleration",
    [Acceleration(share=True, fuse=True), Acceleration(compile="graphs")],
    ids=["fast", "padded as graphs are"],
)
def test_modes_that_only_change_speed_give_the_same_signals(make_generator: Make, acceleration: Acceleration) -> None:
    """Three images where four fit: what is recorded or compiled is padded, and the calls that are looked at are not."""
    generator = make_generator(steps=12, batch_size=4)
    plain = with_attention(generator).generate(CAPTIONS, SEEDS)
    fast = with_attention(generator, acceleration)
    full, seen = fast.denoiser.full, []
    fast.denoiser.full = lambda *arguments: seen.append(len(arguments[0])) or full(*arguments)
    found = fast.generate(CAPTIONS, SEEDS)
    if acceleration.compile != "off":
        assert seen == [4] * 2  # all but the last ten calls
    assert found.signals.keys() == plain.signals.keys()
    for name, values in plain.signals.items():
        np.testing.assert_allclose(found.signals[name], values, rtol=1e-3)
    assert plain.maps_Bhw is not None
    assert found.maps_Bhw is not None
    np.testing.assert_allclose(found.maps_Bhw, plain.maps_Bhw, atol=1e-3)


def test_half_precision_gives_signals_near_to_those_of_single(make_generator: Make) -> None:
    """bfloat16 has 8 bits: some per cent of a norm, less of an entropy, which is a mean over many."""
    single = with_attention(make_generator(steps=4)).generate(CAPTIONS, SEEDS)
    generator = copy.deepcopy(make_generator(steps=4))  # rounding cannot be undone, and others use the checkpoint
    for part in (generator.checkpoint.unet, generator.checkpoint.vae, generator.checkpoint.text_encoder):
        part.to(torch.bfloat16)
    half = with_attention(generator).generate(CAPTIONS, SEEDS)
    np.testing.assert_allclose(half.signals["attention_entropy"], single.signals["attention_entropy"], rtol=0.02)
    np.testing.assert_allclose(half.signals["bright_ending"], single.signals["bright_ending"], rtol=0.1)
    np.testing.assert_allclose(half.maps_Bhw, single.maps_Bhw, atol=0.1)


def test_what_does_not_apply_is_absent(make_generator: Make) -> None:
    unguided = with_attention(make_generator(guidance=1.0, steps=2))
    made = unguided.generate(CAPTIONS, SEEDS)
    assert set(made.signals) == {"attention_entropy"}
    assert made.maps_Bhw is None
    no_caption = unguided.text_encoder(CAPTIONS)
    guided = with_attention(make_generator(steps=2))
    bare = guided.generate_from(type(no_caption)(no_caption.hidden_NTD), SEEDS)  # positions of its end are not known
    assert "attention_entropy" in bare.signals
    assert "bright_ending" not in bare.signals


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_map_is_that_of_two_calls_by_hand(make_generator: Make, prediction_type: str) -> None:
    generator = make_generator(prediction_type, steps=4)
    unet, scheduler = generator.checkpoint.unet, generator.scheduler
    x = first_input(scheduler, 4, SEEDS, generator.latent_shape)
    t = scheduler.timesteps[0]
    with torch.no_grad():
        cond = unet(x, t, encoder_hidden_states=generator.encode(CAPTIONS).clone()).sample
        uncond = unet(x, t, encoder_hidden_states=generator.encode([""]).clone().expand(3, -1, -1)).sample
    # Of v the difference is that of eps times sqrt(a), a factor that falls out of the share.
    squares = ((cond - uncond) ** 2).sum(dim=1)
    expected = squares / squares.flatten(1).max(dim=1).values[:, None, None]
    maps = generator.generate(CAPTIONS, SEEDS).maps_Bhw
    assert maps is not None
    np.testing.assert_allclose(maps, expected, rtol=1e-2, atol=1e-4)
    assert maps.dtype == np.float32
    assert (maps.max(axis=(1, 2)) == 1).all()


def test_a_first_step_that_a_screen_made_has_its_map(make_generator: Make) -> None:
    generator = make_generator(steps=3)
    x = first_input(generator.scheduler, 3, SEEDS, generator.latent_shape)
    texts = [generator.encode([""]).clone().expand(3, -1, -1), generator.encode(CAPTIONS).clone()]
    with torch.no_grad():
        outputs = [
            generator.checkpoint.unet(x, generator.scheduler.timesteps[0], encoder_hidden_states=text).sample
            for text in texts
        ]
    taken_up = generator.generate(CAPTIONS, SEEDS, torch.stack(outputs))
    np.testing.assert_allclose(taken_up.maps_Bhw, generator.generate(CAPTIONS, SEEDS).maps_Bhw, atol=1e-4)


def test_a_caption_that_changes_nothing_has_no_map(make_generator: Make) -> None:
    maps = make_generator(steps=2).generate(["", "the cat"], [1, 2]).maps_Bhw
    assert maps is not None
    assert np.isnan(maps[0]).all()
    assert np.isfinite(maps[1]).all()


def test_what_is_no_grid_has_no_map() -> None:
    hook = DifferenceMapHook()
    hook.begin(2)
    hook.on_step(0, 1.0, torch.zeros(2, 6, 4), torch.ones(2, 6, 4), torch.zeros(2, 6, 4))
    assert hook.maps() is None


def test_maps_keep_their_rows_over_batches_and_hooks(make_generator: Make) -> None:
    one, two = make_generator(batch_size=2, steps=2), make_generator(batch_size=4, steps=2)
    first, second = (generator.generate(CAPTIONS, SEEDS) for generator in (one, two))
    np.testing.assert_allclose(first.maps_Bhw, second.maps_Bhw, atol=1e-4)
    back = second.take(np.array([2, 0]))
    np.testing.assert_array_equal(back.maps_Bhw, second.maps_Bhw[[2, 0]])  # type: ignore[index]
    assert make_generator(hooks=[NoiseNormHook()], steps=1).generate(CAPTIONS[:1], [1]).maps_Bhw is None


def test_tiled_distance_is_the_largest_over_the_tiles(rng: np.random.Generator) -> None:
    """Against loops over sixteen crops; sides that four does not divide lose their last rows."""
    images = rng.integers(0, 256, (3, 42, 33, 3), dtype=np.uint8)
    images[1] = images[0]
    images[1, 5:8, 17:20] ^= 255  # one tile differs
    found = tiled_distances(images)
    for one in range(3):
        for other in range(3):
            tiles = [
                np.sqrt(
                    np.mean(
                        (images[one, r : r + 10, c : c + 8] / 255 - images[other, r : r + 10, c : c + 8] / 255) ** 2
                    )
                )
                for r in range(0, 40, 10)
                for c in range(0, 32, 8)
            ]
            assert found[one, other] == pytest.approx(max(tiles), abs=1e-6)
    similar = tiled_similarity(images)
    assert similar is not None
    np.testing.assert_allclose(similar, [-found[0, 1], -found[0, 1], -min(found[2, 0], found[2, 1])])
    assert tiled_similarity(images[:1]) is None
