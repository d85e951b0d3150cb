"""Embedders against direct computation; TorchScript only with the right hash."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from memscan.config import EmbedderConfig
from memscan.errors import ConfigError, IntegrityError, ModelError, Reason, RowReject
from memscan.models.embedder import load_embedder, resized_size

NaturalImage = Callable[[int, int, int], np.ndarray]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Net(torch.nn.Module):
    """Convolution and pooling over the whole map: takes images of any size, as SSCD does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 12, 5, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x)).mean(dim=(2, 3)) * 7.0


class Silent(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)) * 0.0


class Map(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def write_torchscript(path: Path, module: torch.nn.Module, **settings: Any) -> EmbedderConfig:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module.eval()), buffer)
    path.write_bytes(buffer.getvalue())
    defaults: dict[str, Any] = {"name": "planted_copy", "resize": "square", "size": 64, "batch_size": 2}
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    return EmbedderConfig(path=str(path), sha256=digest, **(defaults | settings))


def directly(net: Callable[[torch.Tensor], torch.Tensor], image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """torchvision's Resize, ToTensor and Normalize on a PIL image, then the network; size is (width, height)."""
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    pixels = ((torch.from_numpy(resized.copy()).float() / 255 - MEAN) / STD).permute(2, 0, 1)[None]
    with torch.no_grad():
        vector = net(pixels)[0]
    return (vector / vector.norm()).numpy()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(3)
    return Net().eval()


@pytest.fixture
def images(natural_image: NaturalImage) -> list[np.ndarray]:
    return [natural_image(seed, *size) for seed, size in enumerate([(64, 64), (50, 80), (64, 64), (80, 50), (50, 80)])]


def test_square(tmp_path: Path, net: Net, images: list[np.ndarray]) -> None:
    embedder = load_embedder(write_torchscript(tmp_path / "embedder.pt", net))
    vectors = embedder.embed(images)
    assert vectors.shape == (5, 12)
    assert vectors.dtype == np.float32
    assert embedder.dimension == 12
    np.testing.assert_allclose(vectors, [directly(net, image, (64, 64)) for image in images], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert embedder.embed([]).shape == (0, 12)


def test_small_edge_keeps_the_aspect_and_the_order(tmp_path: Path, net: Net, images: list[np.ndarray]) -> None:
    embedder = load_embedder(write_torchscript(tmp_path / "embedder.pt", net, resize="small_edge", size=40))
    sizes = [(40, 40), (64, 40), (40, 40), (40, 64), (64, 40)]
    expected = [directly(net, image, size) for image, size in zip(images, sizes, strict=True)]
    np.testing.assert_allclose(embedder.embed(images), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (384, 288)),
        ((333, 500), (288, 432)),  # 432.4, rounded down
        ((288, 1000), (288, 1000)),
        ((1000, 1000), (288, 288)),
        ((10_000, 1), (2304, 288)),  # squeezed to 8:1
    ],
)
def test_small_edge_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(size, EmbedderConfig(path="x")) == expected


def test_torchvision_agrees(images: list[np.ndarray], tmp_path: Path, net: Net) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    pipeline = transforms.Compose(
        [transforms.Resize(40), transforms.ToTensor(), transforms.Normalize(MEAN.tolist(), STD.tolist())]
    )
    embedder: Any = load_embedder(write_torchscript(tmp_path / "e.pt", net, resize="small_edge", size=40))
    for image in images:
        np.testing.assert_allclose(embedder._prepare(image), pipeline(Image.fromarray(image)).numpy(), atol=1e-6)


def test_specification_names_the_measurement(tmp_path: Path, net: Net) -> None:
    config = write_torchscript(tmp_path / "embedder.pt", net)
    assert config.sha256 is not None
    assert load_embedder(config).spec.id == f"embedder:planted_copy@{config.sha256[:12]}:square64-bilinear-imagenet"
    other = config.model_copy(update={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize": "small_edge"})
    assert load_embedder(other).spec.preprocessing == "small_edge64-bilinear-0.5_0.5_0.5_0.5_0.5_0.5"


def test_torchscript_needs_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "embedder.pt"
    path.write_bytes(b"garbage, or worse")
    with pytest.raises(ConfigError, match=r"embedder\.sha256: TorchScript is executable code"):
        load_embedder(EmbedderConfig(path=str(path)))
    with pytest.raises(IntegrityError, match="not loaded"):
        load_embedder(EmbedderConfig(path=str(path), sha256="0" * 64))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match="not a loadable TorchScript model"):
        load_embedder(EmbedderConfig(path=str(path), sha256=digest))
    with pytest.raises(ModelError, match="no such model file"):
        load_embedder(EmbedderConfig(path=str(tmp_path / "none.pt"), sha256=digest))


def test_nothing_is_parsed_under_a_wrong_hash(tmp_path: Path, net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_torchscript(tmp_path / "embedder.pt", net)
    monkeypatch.setattr(torch.jit, "load", lambda *_args, **_kwargs: pytest.fail("parsed"))
    with pytest.raises(IntegrityError):
        load_embedder(config.model_copy(update={"sha256": "f" * 64}))


def test_a_model_that_is_no_embedder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gives \[1, 3, 64, 64\] for one image, not \[1, D\]"):
        load_embedder(write_torchscript(tmp_path / "map.pt", Map()))
    with pytest.raises(ModelError, match=r"cannot embed an image of shape \[1, 3, 64, 64\]"):
        load_embedder(write_torchscript(tmp_path / "linear.pt", torch.nn.Linear(5, 2)))


def test_a_vector_without_direction_rejects_the_row(tmp_path: Path, images: list[np.ndarray]) -> None:
    with pytest.raises(RowReject) as caught:
        load_embedder(write_torchscript(tmp_path / "silent.pt", Silent())).embed(images[:1])
    assert caught.value.reason is Reason.EMBEDDING_FAILED


def vision_model() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=10,
        initializer_factor=20.0,
    )
    return CLIPVisionModelWithProjection(config).eval()


def test_transformers_folder_by_the_configured_preprocessing(tmp_path: Path, images: list[np.ndarray]) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(
        ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    ).eval()
    model.save_pretrained(tmp_path / "vit")
    config = EmbedderConfig(kind="transformers", path=str(tmp_path / "vit"), resize="square", size=32, batch_size=2)
    embedder = load_embedder(config)
    expected = [directly(lambda x: model(x).pooler_output, image, (32, 32)) for image in images]
    np.testing.assert_allclose(embedder.embed(images), expected, atol=1e-5)
    assert embedder.spec.name == "vit"
    assert embedder.spec.preprocessing == "square32-bilinear-imagenet"


def test_transformers_folder_with_its_image_processor(tmp_path: Path, images: list[np.ndarray]) -> None:
    model = vision_model()
    model.save_pretrained(tmp_path / "clip")
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(settings))
    embedder: Any = load_embedder(EmbedderConfig(kind="transformers", path=str(tmp_path / "clip"), batch_size=2))
    expected = []
    for image in images:
        height, width = image.shape[:2]
        size = (32, round(32 * height / width)) if width < height else (int(32 * width / height), 32)
        resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
        crop = np.asarray(resized)[top : top + 32, left : left + 32].astype(np.float32) / 255
        pixels = torch.from_numpy(((crop - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]).astype(np.float32)).permute(2, 0, 1)
        with torch.no_grad():
            vector = model(pixel_values=pixels[None]).image_embeds[0]
        expected.append((vector / vector.norm()).numpy())
    np.testing.assert_allclose(embedder.embed(images), expected, atol=1e-4)
    assert embedder.dimension == len(expected[0])
    assert embedder.spec.preprocessing.startswith("CLIPImageProcessor")


def test_the_image_side_of_a_two_sided_model(tmp_path: Path, images: list[np.ndarray]) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = side | {"image_size": 32, "patch_size": 8}
    text = side | {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).eval()
    model.save_pretrained(tmp_path / "clip")
    config = EmbedderConfig(kind="transformers", path=str(tmp_path / "clip"), resize="square", size=32)

    def project(pixels: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = model.visual_projection(model.vision_model(pixels).pooler_output)
        return projected

    expected = [directly(project, image, (32, 32)) for image in images]
    np.testing.assert_allclose(load_embedder(config).embed(images), expected, atol=1e-5)


def test_transformers_weights_that_do_not_fit(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    vision_model().save_pretrained(tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("visual_projection.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing or of another shape, first visual_projection\.weight"):
        load_embedder(EmbedderConfig(kind="transformers", path=str(tmp_path / "clip"), resize="square", size=32))


def test_transformers_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        load_embedder(EmbedderConfig(kind="transformers", path=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_embedder(EmbedderConfig(kind="transformers", path=str(tmp_path / "empty")))
