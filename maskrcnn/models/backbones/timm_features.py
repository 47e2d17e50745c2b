"""Backbones of timm (PyTorch Image Models).

Shapes: B images, C channels, H x W cells.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from maskrcnn.errors import InputError
from maskrcnn.models.backbones.parts import Backbone, BackboneConfig, RegionStage
from maskrcnn.paths import expand
from maskrcnn.runtime.files import read_tensors

STRIDES = (4, 8, 16, 32)


class TimmConfig(BackboneConfig):
    """A model of timm that supports `features_only` and has feature maps at strides 4, 8, 16 and 32, all returned.

    Needs `pip install 'maskrcnn[timm]'`. `model.pixels` must match the weights.
    """

    kind: Literal["timm"] = "timm"
    name: str = Field(description="timm's name of the model, such as convnext_tiny.fb_in22k")
    weights: str = "imagenet"  # "imagenet" (timm downloads them), "none", or the path of timm's state dict
    freeze: int = Field(2, ge=0, le=5, description="number of frozen stages, from the first on; 2: the stem and C2")
    frozen_norms: bool = Field(True, description="batch norms of all stages keep their statistics and weights")

    @property
    def strides(self) -> tuple[int, ...]:
        """Those of C2 to C5."""
        return STRIDES

    def build(self) -> TimmFeatures:
        """Return the backbone with random weights.

        Raises:
            InputError: timm is not installed, has no such model, or the model lacks one of the feature maps.
        """
        backbone = TimmFeatures(_create(self.name, pretrained=False), self.name)
        self._freeze(backbone)
        return backbone

    def load_pretrained(self, backbone: Backbone, region_stage: RegionStage | None, trunk: nn.Module | None) -> None:
        """Load the weights into the backbone.

        Raises:
            InputError: the file cannot be read or does not have the tensors of the backbone, or the download failed.
        """
        assert isinstance(backbone, TimmFeatures)
        if self.weights == "none":
            return
        if self.weights == "imagenet":
            pretrained = _create(self.name, pretrained=True)
            backbone.features.load_state_dict(pretrained.state_dict())
            return
        state = read_tensors(expand(self.weights))
        wanted = backbone.features.state_dict()
        if any(name not in state for name in wanted):
            # `features_only` renames modules of most models: `stages.0` is `stages_0`.
            state = {_flat_name(name, backbone.features): tensor for name, tensor in state.items()}
        for name, tensor in wanted.items():
            if name not in state or state[name].shape != tensor.shape:
                problem = f"has the shape {list(state[name].shape)}" if name in state else "is missing"
                raise InputError(f"{self.weights}: these are not the weights of {self.name}: {name} {problem}")
        backbone.features.load_state_dict({name: state[name] for name in wanted})

    def _freeze(self, backbone: TimmFeatures) -> None:
        from timm.utils.model import freeze_batch_norm_2d  # keeps the activations that timm fuses with its norms

        if self.frozen_norms:
            backbone.features = freeze_batch_norm_2d(backbone.features)
        for stage in backbone.stages()[: self.freeze]:
            stage.requires_grad_(False)


class TimmFeatures(Backbone):
    """The feature maps C2 to C5 of a model of timm."""

    def __init__(self, features: nn.Module, name: str) -> None:
        """Wrap a `features_only` model.

        Raises:
            InputError: it lacks one of the feature maps.
        """
        super().__init__()
        self.features = features
        information: Any = features.feature_info
        self.channels, self.strides = tuple(information.channels()), tuple(information.reduction())
        if self.strides != STRIDES:
            raise InputError(
                f"model.backbone.name: {name} has feature maps at strides {list(self.strides)}, not {list(STRIDES)}"
            )
        self._ends: list[str] = information.module_name()
        self._channels_last = str(getattr(features, "output_fmt", "")).endswith("NHWC")

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return C2 to C5, each `(B, C, H, W)`."""
        maps = self.features(pixels)
        return tuple(values.permute(0, 3, 1, 2) if self._channels_last else values for values in maps)

    def stages(self) -> list[nn.Module]:
        """Return the stem, and the stages that end with C2 to C5."""
        stages: list[nn.Module] = []
        stage = nn.ModuleList()
        for name, module in self._modules_in_order():
            if name == self._ends[0]:  # the modules before it are the stem
                stages.append(stage)
                stage = nn.ModuleList()
            stage.append(module)
            if name in self._ends:
                stages.append(stage)
                stage = nn.ModuleList()
        return stages

    def _modules_in_order(self) -> list[tuple[str, nn.Module]]:
        """Return the children, and instead of a child with outputs inside its children, by timm's dotted names."""
        modules: list[tuple[str, nn.Module]] = []
        flat = {end.replace(".", "_"): end for end in self._ends}
        for name, child in self.features.named_children():
            if any(end.startswith(f"{name}.") for end in self._ends):
                modules += [(f"{name}.{inner}", module) for inner, module in child.named_children()]
            else:
                modules.append((flat.get(name, name), child))
        return modules


def _create(name: str, *, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise InputError("model.backbone: kind timm needs the package: pip install 'maskrcnn[timm]'") from error
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise InputError(f"model.backbone.name: timm {timm.__version__} has no model '{name}'")
    arguments: dict[str, Any] = {"pretrained": pretrained, "features_only": True, "out_indices": (-4, -3, -2, -1)}
    try:
        try:
            # Window attention: images of any size. Other models do not know the argument.
            return timm.create_model(name, strict_img_size=False, **arguments)
        except TypeError:
            return timm.create_model(name, **arguments)
    except (RuntimeError, OSError) as error:
        if not pretrained:
            raise InputError(f"model.backbone.name: timm cannot build the feature maps of {name}: {error}") from error
        raise InputError(
            f"model.backbone.weights: timm cannot load the weights of {name} ({error}); download them elsewhere, and "
            "set weights to the path of the file"
        ) from error


def _flat_name(name: str, features: nn.Module) -> str:
    """Return the name of a parameter in a `features_only` model, which joins the first two parts of some names."""
    first, _, rest = name.partition(".")
    second, _, third = rest.partition(".")
    return f"{first}_{second}.{third}" if hasattr(features, f"{first}_{second}") else name
