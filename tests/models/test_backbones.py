"""The interface of backbones, and parity of their bodies with torchvision's classifiers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from maskrcnn.models.backbones.parts import freeze_stages
from maskrcnn.models.backbones.resnet import ResNet, ResNetConfig
from maskrcnn.models.backbones.vgg import VGG, VGGConfig
from maskrcnn.models.necks.fpn import FPN, FPNConfig
from maskrcnn.models.necks.parts import NeckConfig, NoNeckConfig
from maskrcnn.models.norms import FrozenBatchNorm2d, NormKind, build_norm, conv_norm

HEIGHT, WIDTH = 64, 128  # multiples of P6's stride
PYRAMID = ("conv3", "conv4", "conv5", "pool5")


# The feature maps, by their names in papers.
MAPS: dict[str, dict[str, Any]] = {
    "c4": {"out_features": ["res4"], "res5_on_regions": True},
    "c5": {"out_features": ["res5"]},
    "dc5": {"out_features": ["res5"], "res5_dilation": 2},
    "c2 to c5": {"out_features": ["res2", "res3", "res4", "res5"]},
}


def resnet_config(depth: int, maps: str, **settings: Any) -> ResNetConfig:
    return ResNetConfig.model_validate({"depth": depth, "weights": "none", **MAPS[maps], **settings})


def resnet(depth: int, maps: str, **settings: Any) -> ResNet:
    return resnet_config(depth, maps, **settings).build()


def vgg_config(depth: int, *out_features: str, **settings: Any) -> VGGConfig:
    return VGGConfig.model_validate({"depth": depth, "weights": "none", "out_features": out_features, **settings})


def vgg(depth: int, *out_features: str, **settings: Any) -> VGG:
    return vgg_config(depth, *out_features, **settings).build()


def resnext_config(maps: str) -> ResNetConfig:
    return resnet_config(50, maps, groups=32, width_per_group=4)


def pixels(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, HEIGHT, WIDTH)


def randomize_norms(module: nn.Module) -> None:
    """Set statistics and scales like those of a trained model, with scales below 1 to keep activations finite."""
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.5, 1.5)
                norm.weight.uniform_(0.3, 0.6)
                norm.bias.normal_(0, 0.1)


# The interface.


@pytest.mark.parametrize(
    ("config", "channels", "strides"),
    [
        pytest.param(resnet_config(18, "c4"), (256,), (16,), id="resnet18-c4"),
        pytest.param(resnet_config(18, "c5", norm="gn"), (512,), (32,), id="resnet18-c5-gn"),
        pytest.param(resnet_config(18, "dc5", norm="bn", freeze=0), (512,), (16,), id="resnet18-dc5-bn"),
        pytest.param(
            resnet_config(18, "c2 to c5", norm="sync_bn"), (64, 128, 256, 512), (4, 8, 16, 32), id="resnet18-sync_bn"
        ),
        pytest.param(
            resnet_config(18, "c5", out_features=["res3", "res5"]), (128, 512), (8, 32), id="resnet18-two maps"
        ),
        pytest.param(resnet_config(34, "c4", norm="none"), (256,), (16,), id="resnet34-c4-none"),
        pytest.param(resnet_config(50, "c4", stride_in_1x1=True), (1024,), (16,), id="resnet50-c4-caffe"),
        pytest.param(resnet_config(50, "c5"), (2048,), (32,), id="resnet50-c5"),
        pytest.param(resnet_config(50, "dc5"), (2048,), (16,), id="resnet50-dc5"),
        pytest.param(resnet_config(50, "c2 to c5"), (256, 512, 1024, 2048), (4, 8, 16, 32), id="resnet50"),
        pytest.param(resnext_config("c4"), (1024,), (16,), id="resnext50-c4"),
        pytest.param(resnext_config("c2 to c5"), (256, 512, 1024, 2048), (4, 8, 16, 32), id="resnext50"),
        pytest.param(vgg_config(11, "conv5"), (512,), (16,), id="vgg11-conv5"),
        pytest.param(vgg_config(11, "pool5", norm="bn"), (512,), (32,), id="vgg11-pool5-bn"),
        pytest.param(vgg_config(13, *PYRAMID, norm="gn"), (256, 512, 512, 512), (4, 8, 16, 32), id="vgg13-gn"),
        pytest.param(vgg_config(16, "conv5", norm="bn"), (512,), (16,), id="vgg16-conv5-bn"),
        pytest.param(vgg_config(16, "pool5"), (512,), (32,), id="vgg16-pool5"),
        pytest.param(vgg_config(16, *PYRAMID), (256, 512, 512, 512), (4, 8, 16, 32), id="vgg16"),
    ],
)
def test_features_match_channels_and_strides(
    config: ResNetConfig | VGGConfig, channels: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    backbone = config.build().eval()
    assert backbone.channels == channels
    assert backbone.strides == config.strides == strides
    with torch.no_grad():
        features = backbone(pixels())
    assert [level.shape for level in features] == [
        (1, width, HEIGHT // stride, WIDTH // stride) for width, stride in zip(channels, strides, strict=True)
    ]


@pytest.mark.parametrize(
    ("backbone", "neck"),
    [
        pytest.param(resnet_config(18, "c2 to c5", norm="sync_bn"), FPNConfig(), id="resnet18"),
        pytest.param(resnet_config(18, "c2 to c5"), FPNConfig(channels=32, norm="gn"), id="resnet18-gn"),
        pytest.param(resnet_config(50, "c5", out_features=["res4", "res5"]), FPNConfig(), id="resnet50-two maps"),
        pytest.param(vgg_config(16, *PYRAMID), FPNConfig(norm="bn"), id="vgg16-bn"),
        pytest.param(resnet_config(18, "c4"), NoNeckConfig(), id="resnet18-no neck"),
        pytest.param(vgg_config(11, "conv4", "conv5"), NoNeckConfig(), id="vgg11-no neck"),
    ],
)
def test_the_maps_of_a_neck_match_its_channels_and_strides(
    backbone: ResNetConfig | VGGConfig, neck: NeckConfig
) -> None:
    body = backbone.build().eval()
    built = neck.build(channels=body.channels, strides=body.strides).eval()
    assert built.strides == neck.out_strides(backbone.strides)
    assert built.strides[: built.roi_levels] == body.strides
    with torch.no_grad():
        features = built(body(pixels()))
    assert [level.shape for level in features] == [
        (1, built.channels, HEIGHT // stride, WIDTH // stride) for stride in built.strides
    ]


@pytest.mark.parametrize("depth", [18, 50])
def test_stage_5_halves_a_region(depth: int) -> None:
    config = resnet_config(depth, "c4")
    res5 = config.build_region_stage()
    assert res5 is not None
    assert (res5.in_channels, res5.stride) == (config.build().channels[0], config.region_stride)
    regions = torch.randn(3, res5.in_channels, 14, 14)
    assert res5(regions).shape == (3, res5.channels, 7, 7)
    assert res5(regions[:0]).shape == (0, res5.channels, 7, 7)


def test_without_res5_on_regions_there_is_no_region_stage() -> None:
    for config in (resnet_config(18, "c5"), resnet_config(18, "c4", res5_on_regions=False), vgg_config(11, "conv5")):
        assert config.build_region_stage() is None
        assert config.region_stride == 1


def test_coarser_levels_reach_the_finer_ones() -> None:
    """The top-down path connects C5 to P2. There is no bottom-up path from C2 to P5."""
    pyramid = FPN((4, 4, 4, 4), (4, 8, 16, 32, 64), channels=8)
    maps = [torch.randn(1, 4, 64 // stride, 64 // stride, requires_grad=True) for stride in (4, 8, 16, 32)]
    levels = pyramid(maps)
    assert torch.autograd.grad(levels[0].sum(), maps[3], retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(levels[3].sum(), maps[0], allow_unused=True)[0] is None
    assert torch.equal(levels[4], levels[3][:, :, ::2, ::2])


# torchvision's classifiers.


def load_into(body: nn.Module, classifier: nn.Module, *, without: str) -> None:
    """Copy the weights by name; assert that only the layers in `without` are not copied."""
    keys = body.load_state_dict(classifier.state_dict(), strict=False)
    assert not keys.missing_keys
    unexpected = [name for name in keys.unexpected_keys if not name.endswith("num_batches_tracked")]
    assert {name.split(".")[0] for name in unexpected} == {without}


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet18", {"depth": 18}),
        ("resnet50", {"depth": 50}),
        ("resnext50_32x4d", {"depth": 50, "groups": 32, "width_per_group": 4}),
    ],
)
def test_resnets_are_torchvisions(name: str, settings: dict[str, Any], norm: str) -> None:
    theirs = getattr(torchvision.models, name)().eval()
    randomize_norms(theirs)
    config = ResNetConfig.model_validate({**settings, "out_features": ["res5"], "norm": norm})
    assert config.architecture == name
    ours = config.build().eval()
    load_into(ours, theirs, without="fc")
    image = pixels()
    with torch.no_grad():
        expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            expected = layer(expected)
        (features,) = ours(image)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_separate_stage_5_is_torchvisions_layer4() -> None:
    theirs = torchvision.models.resnet18().eval()
    randomize_norms(theirs)
    config = resnet_config(18, "c4")
    res5 = config.build_region_stage()
    assert res5 is not None
    names = {*config.build().state_dict(), *res5.state_dict()}
    assert names == {n for n in theirs.state_dict() if not n.startswith("fc.") and not n.endswith("_tracked")}
    res5.load_state_dict(theirs.state_dict(), strict=False)
    regions = torch.randn(2, 256, 14, 14)
    with torch.no_grad():
        torch.testing.assert_close(res5(regions), theirs.layer4(regions), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("depth", "norm"), [(11, "none"), (16, "none"), (16, "frozen_bn"), (11, "bn")])
@pytest.mark.parametrize("output", ["conv5", "pool5"])
def test_vggs_are_torchvisions(depth: int, norm: str, output: str) -> None:
    config = VGGConfig.model_validate({"depth": depth, "norm": norm, "out_features": [output]})
    convolutions = getattr(torchvision.models, config.architecture)(num_classes=1, init_weights=False).features.eval()
    theirs = nn.ModuleDict({"features": convolutions, "classifier": nn.Linear(1, 1)})
    randomize_norms(theirs)
    ours = config.build().eval()
    load_into(ours, theirs, without="classifier")
    image = pixels()
    with torch.no_grad():
        expected = convolutions[: len(convolutions) - (output == "conv5")](image)
        (features,) = ours(image)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_all_architectures_exist() -> None:
    for depth in (18, 34, 50, 101, 152):
        assert ResNetConfig(depth=depth).architecture in torchvision.models.list_models()
    for depth, width in ((50, 4), (101, 8)):
        assert (
            ResNetConfig(depth=depth, groups=32, width_per_group=width).architecture in torchvision.models.list_models()
        )
    assert ResNetConfig(depth=101, groups=64, width_per_group=4).architecture == "resnext101_64x4d"
    for depth in (11, 13, 16, 19):
        assert VGGConfig(depth=depth).architecture == f"vgg{depth}"
        assert VGGConfig(depth=depth, norm="bn").architecture == f"vgg{depth}_bn"


def test_basic_blocks_have_no_groups() -> None:
    with pytest.raises(ValueError, match="depth 18 has basic blocks"):
        ResNetConfig(depth=18, groups=32)


# Strides.


def test_dilation_keeps_the_stride_and_the_parameters() -> None:
    c5, dc5 = resnet(50, "c5"), resnet(50, "dc5")
    dc5.load_state_dict(c5.state_dict())  # equal names and shapes
    assert dc5.strides == (16,)
    dilated = [
        module for module in dc5.layer4.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    assert all(conv.dilation == conv.padding == (2, 2) and conv.stride == (1, 1) for conv in dilated)
    assert all(conv.dilation == (1, 1) for conv in dc5.layer3.modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize(("in_1x1", "first", "second"), [(False, (1, 1), (2, 2)), (True, (2, 2), (1, 1))])
def test_the_stride_is_where_the_config_says(in_1x1: bool, first: tuple[int, int], second: tuple[int, int]) -> None:
    config = resnet_config(50, "c4", stride_in_1x1=in_1x1)
    backbone, res5 = config.build(), config.build_region_stage()
    assert res5 is not None
    for stage in (backbone.layer2, backbone.layer3, res5.layer4):
        assert stage[0].conv1.stride == first
        assert stage[0].conv2.stride == second
        assert stage[0].downsample[0].stride == (2, 2)
        assert stage[1].conv1.stride == stage[1].conv2.stride == (1, 1)


# Freezing.


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize(
    "kind", [lambda **s: resnet(18, "c2 to c5", **s), lambda **s: vgg(11, "pool5", **s)], ids=["resnet", "vgg"]
)
@pytest.mark.parametrize("count", [0, 2, 5])
def test_frozen_stages_are_constants(kind: Any, count: int, norm: NormKind) -> None:
    backbone = kind(norm=norm, freeze=count)
    stages = backbone.stages()
    assert len(stages) == 5
    assert {id(p) for stage in stages for p in stage.parameters()} == {id(p) for p in backbone.parameters()}
    before = {name: value.clone() for name, value in backbone.state_dict().items()}

    loss = sum(level.square().mean() for level in backbone.train()(pixels(2)[:, :, :32, :64]))
    if loss.requires_grad:  # a completely frozen VGG has no trainable parameters
        loss.backward()

    for stage in stages[:count]:
        assert all(not parameter.requires_grad and parameter.grad is None for parameter in stage.parameters())
    for stage in stages[count:]:
        assert all(parameter.grad is not None for parameter in stage.parameters())
        assert all(parameter.grad.any() for parameter in stage.parameters() if parameter.dim() > 1)
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    updated_means = {name for name in changed if name.endswith("running_mean")}
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(updated_means) == len(norms)
    assert (len(norms) > 0) == (norm == "bn" and count < 5)


def test_a_frozen_stage_keeps_its_statistics() -> None:
    """A plain batch norm in a frozen stage would still update its running statistics."""
    for body in (resnet(18, "c5", norm="bn", freeze=1), vgg(11, "conv5", norm="bn", freeze=1)):
        first = next(module for module in body.modules() if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d))
        assert isinstance(first, FrozenBatchNorm2d)
        assert any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
        body.train()(pixels(2))
        assert torch.equal(first.running_mean, torch.zeros(64))


def test_freezing_does_not_change_the_output() -> None:
    body = resnet(18, "c5", norm="bn", freeze=0).eval()
    image = pixels().double()  # folding the norms changes the rounding
    expected = body.double()(image)[0]
    freeze_stages(body, body.stages())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    torch.testing.assert_close(body.double()(image)[0], expected)


# Activation checkpointing.


@pytest.mark.parametrize(("norm", "count"), [("frozen_bn", 2), ("bn", 0), ("gn", 2)])
@pytest.mark.parametrize(
    "kind", [lambda **s: resnet(18, "c2 to c5", **s), lambda **s: vgg(11, "pool5", **s)], ids=["resnet", "vgg"]
)
def test_checkpointing_saves_memory_and_changes_nothing(kind: Any, norm: NormKind, count: int) -> None:
    """Equal gradients and equal batch norm statistics, although batch norms run twice per batch."""
    results = []
    for checkpoint_activations in (False, True):
        torch.manual_seed(1)
        backbone = kind(norm=norm, freeze=count, checkpoint_activations=checkpoint_activations)
        saved = SavedBytes(backbone)
        with saved:
            features = backbone.train()(pixels(2)[:, :, :, :64])
        sum(level.square().mean() for level in features).backward()
        gradients = {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}
        results.append((saved.count, {**gradients, **dict(backbone.named_buffers())}))
    (plain_bytes, expected), (checkpointed_bytes, values) = results
    assert checkpointed_bytes < 0.75 * plain_bytes
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert torch.equal(value, expected[name]), name


def test_stage_5_on_regions_is_checkpointed() -> None:
    counts = []
    for checkpoint_activations in (False, True):
        res5 = resnet_config(18, "c4", checkpoint_activations=checkpoint_activations).build_region_stage()
        assert res5 is not None
        saved = SavedBytes(res5)
        with saved:
            res5(torch.randn(2, 256, 14, 14))
        counts.append(saved.count)
    assert counts[1] < 0.5 * counts[0]


def test_frozen_stages_are_not_run_twice() -> None:
    backbone = resnet(18, "c5", freeze=3, checkpoint_activations=True)
    runs: Counter[str] = Counter()
    for name, module in backbone.named_children():
        for block in module.children():
            block.register_forward_pre_hook(lambda *_, stage=name: runs.update([stage]))
    backbone(pixels())[0].sum().backward()
    assert runs == {"layer1": 2, "layer2": 2, "layer3": 4, "layer4": 4}  # two blocks each


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes saved for the backward pass inside a `with` block, without the parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._storages = {parameter.untyped_storage().data_ptr(): 0 for parameter in module.parameters()}
        super().__init__(self._record, lambda tensor: tensor)

    def _record(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    @property
    def count(self) -> int:
        return sum(self._storages.values())


# Norms.


@pytest.mark.parametrize("bias", [False, True])
def test_folding_a_frozen_norm_changes_nothing(bias: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=bias).double()
    norm = FrozenBatchNorm2d(6, eps=1e-3).double()
    randomize_norms(norm)
    image = torch.randn(2, 4, 9, 11, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 6, 5, 6, dtype=torch.float64)
    inputs = [image, *conv.parameters()]
    folded, unfolded = conv_norm(conv, norm, image), norm(conv(image))
    torch.testing.assert_close(folded, unfolded)
    gradients, expected = (torch.autograd.grad((out * weight).sum(), inputs) for out in (folded, unfolded))
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_a_frozen_norm_by_hand() -> None:
    norm = FrozenBatchNorm2d(1, eps=0.5)
    norm.load_state_dict(
        {
            "weight": torch.tensor([3.0]),
            "bias": torch.tensor([1.0]),
            "running_mean": torch.tensor([2.0]),
            "running_var": torch.tensor([3.5]),
        }
    )
    # (5 - 2) / sqrt(3.5 + 0.5) * 3 + 1
    assert norm(torch.full((1, 1, 1, 1), 5.0)).item() == 5.5
    assert not list(norm.parameters())


@pytest.mark.parametrize("kind", ["none", "frozen_bn", "bn", "sync_bn", "gn"])
def test_a_norm_keeps_the_shape(kind: NormKind) -> None:
    norm = build_norm(kind, 64, eps=1e-3).eval()
    assert norm(torch.randn(2, 64, 5, 7)).shape == (2, 64, 5, 7)
    assert getattr(norm, "eps", 1e-3) == (1e-5 if kind == "gn" else 1e-3)  # GroupNorm ignores `eps`
