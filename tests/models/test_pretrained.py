"""Pretrained classifier weights: tensors loaded, messages about the other tensors, errors."""

from __future__ import annotations

import logging
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from maskrcnn.errors import InputError
from maskrcnn.models import pretrained
from maskrcnn.models.backbones.resnet import ResNet, ResNetConfig
from maskrcnn.models.backbones.vgg import VGGConfig
from maskrcnn.models.box_head import VGGFullyConnected
from maskrcnn.models.mask_rcnn import MaskRCNNConfig
from maskrcnn.models.pretrained import imagenet_file, load_pretrained


@pytest.fixture
def real_file(shared_data: Path) -> Path:
    return shared_data / "resnet18_imagenet" / "resnet18_imagenet_conv1_to_layer3.pth"


C4 = ResNetConfig(depth=18, out_features=("res4",), res5_on_regions=True)


def resnet18(config: ResNetConfig = C4) -> ResNet:
    return config.build()


def load(modules: list[nn.Module | None], path: Path, architecture: str = "resnet18") -> None:
    load_pretrained(modules, str(path), architecture=architecture)


def saved(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def full_state(body: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in body.state_dict().items()}


# Loading.


def test_every_tensor_of_the_body_comes_from_the_file(tmp_path: Path) -> None:
    body = resnet18()
    state = full_state(body)
    extra = {"fc.weight": torch.zeros(3, 3), "bn1.num_batches_tracked": torch.tensor(5)}
    load([body], saved(tmp_path / "w.pth", state | extra))
    assert all(torch.equal(value, state[name]) for name, value in body.state_dict().items())


def test_body_and_separate_stage_5_load_from_one_file(tmp_path: Path) -> None:
    body, res5 = C4.build(), C4.build_region_stage()
    assert res5 is not None
    state = full_state(body) | full_state(res5)
    load([body, res5, None], saved(tmp_path / "w.pth", state))
    assert torch.equal(res5.layer4[0].conv1.weight, state["layer4.0.conv1.weight"])
    assert torch.equal(body.conv1.weight, state["conv1.weight"])


def test_the_real_file_fills_c4(real_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = resnet18()
    with caplog.at_level(logging.INFO):
        load([body], real_file)
    state = torch.load(real_file, weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in body.state_dict().items())
    assert "missing" not in caplog.text
    body.eval()
    with torch.no_grad():
        features = body(torch.randn(1, 3, 64, 64))[0]
    assert 0.1 < features.abs().mean() < 10  # trained weights keep the scale of their input


def test_tensors_missing_in_the_real_file_are_listed(real_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = resnet18(ResNetConfig(depth=18))
    before = body.layer4[1].conv2.weight.clone()
    with caplog.at_level(logging.INFO):
        load([body], real_file)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "20 tensors of the model are missing" in warning
    assert "layer4.1.conv2.weight" in warning
    assert torch.equal(body.layer4[1].conv2.weight, before)


def test_fc6_and_fc7_come_from_a_vgg(tmp_path: Path) -> None:
    body, trunk = VGGConfig(depth=11).build(), VGGFullyConnected(8, width=4)
    state = full_state(body) | full_state(trunk) | {"classifier.6.weight": torch.zeros(1000, 4)}
    load([body, None, trunk], saved(tmp_path / "vgg.pth", state), "vgg11")
    assert torch.equal(trunk.classifier[0].weight, state["classifier.0.weight"])
    assert torch.equal(trunk.classifier[3].bias, state["classifier.3.bias"])
    assert torch.equal(body.features[0].weight, state["features.0.weight"])


def test_the_model_takes_the_weights_that_its_config_names(tmp_path: Path) -> None:
    body = resnet18(ResNetConfig(depth=18))
    state = full_state(body)
    path = saved(tmp_path / "w.pth", state)
    settings = {
        "backbone": {"kind": "resnet", "depth": 18, "weights": str(path)},
        "box_head": {"kind": "fc", "width": 8},
    }
    config = MaskRCNNConfig.model_validate(settings)
    model = config.build(2)
    assert torch.equal(model.backbone.conv1.weight, state["conv1.weight"])
    assert not torch.equal(config.build(2, pretrained=False).backbone.conv1.weight, state["conv1.weight"])


def test_unused_tensors_are_logged_except_the_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = resnet18()
    state = full_state(body) | {"layer4.0.conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}
    with caplog.at_level(logging.INFO):
        load([body], saved(tmp_path / "w.pth", state))
    assert "ignored 1 tensors that the model does not have: layer4.0.conv1.weight" in caplog.text
    assert "fc.bias" not in caplog.text


# Errors.


def test_another_shape_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    body = resnet18()
    before = body.conv1.weight.clone()
    state = full_state(body) | {"layer1.0.conv1.weight": torch.zeros(128, 64, 3, 3)}
    path = saved(tmp_path / "w.pth", state)
    with pytest.raises(InputError) as error:
        load([body], path)
    message = str(error.value)
    assert str(path) in message
    assert "layer1.0.conv1.weight: (128, 64, 3, 3) in the file, (64, 64, 3, 3) in the model" in message
    assert torch.equal(body.conv1.weight, before)


def test_a_long_list_of_wrong_shapes_is_truncated(tmp_path: Path) -> None:
    body = resnet18()
    path = saved(tmp_path / "w.pth", {name: torch.zeros(2, 2) for name in body.state_dict()})
    with pytest.raises(InputError, match=f"and {len(body.state_dict()) - 10} more"):
        load([body], path)


def test_the_real_file_does_not_fit_another_depth(real_file: Path) -> None:
    with pytest.raises(InputError, match=r"does not fit resnet50.*\n.*layer1\.0\.conv1\.weight: \(64, 64, 3, 3\)"):
        load([ResNetConfig(depth=50, out_features=("res4",)).build()], real_file, "resnet50")


@pytest.mark.parametrize("state", [{"stem.conv.weight": torch.zeros(2)}, {"model": {}, "iteration": 3}, {}])
def test_a_file_without_known_names_is_refused(tmp_path: Path, state: dict[str, object]) -> None:
    path = saved(tmp_path / "w.pth", state)
    with pytest.raises(InputError, match="has a parameter name of resnet18") as error:
        load([resnet18()], path)
    assert str(path) in str(error.value)
    assert min(state, default="nothing") in str(error.value)


def test_no_file_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.pth"):
        load([resnet18()], tmp_path / "absent.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a zip")
    with pytest.raises(InputError, match=r"broken\.pth"):
        load([resnet18()], tmp_path / "broken.pth")


# torchvision's cache and download.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; every download fails."""

    def fail(url: str, path: str) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(pretrained, "download_url_to_file", fail)
    monkeypatch.setattr(pretrained, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_without_internet_the_message_says_which_file_to_put_where(cache: Path) -> None:
    with pytest.raises(InputError) as error:
        imagenet_file("resnet50")
    message = str(error.value)
    assert str(cache / "resnet50-0676ba61.pth") in message
    assert "https://download.pytorch.org/models/resnet50-0676ba61.pth" in message
    assert "weights=none --set model.backbone.freeze=0" in message  # frozen random stages would never learn
    assert "model.backbone.weights" in message
    assert "no route to host" in message


def test_a_cache_that_cannot_be_written_raises_an_input_error(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(InputError, match="resnet50-0676ba61"):
        imagenet_file("resnet50")


def test_a_cached_file_is_used(cache: Path) -> None:
    cache.mkdir(parents=True)
    body = resnet18()
    state = full_state(body)
    path = saved(cache / "resnet18-f37072fd.pth", state)
    assert imagenet_file("resnet18") == path
    load_pretrained([body], "imagenet", architecture="resnet18")
    assert torch.equal(body.conv1.weight, state["conv1.weight"])


def test_a_missing_file_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = full_state(resnet18())
    monkeypatch.setattr(pretrained, "download_url_to_file", lambda url, path: torch.save(state, path))
    assert imagenet_file("resnet18") == cache / "resnet18-f37072fd.pth"
    assert (cache / "resnet18-f37072fd.pth").is_file()


def test_an_architecture_that_torchvision_lacks() -> None:
    with pytest.raises(InputError, match="no ImageNet weights of resnext101_32x4d; name a file"):
        imagenet_file(ResNetConfig(depth=101, groups=32, width_per_group=4).architecture)
