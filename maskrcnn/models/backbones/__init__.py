"""Backbones: networks that map images to feature maps."""

from typing import Annotated

from pydantic import Field

from maskrcnn.models.backbones.resnet import ResNetConfig
from maskrcnn.models.backbones.vgg import VGGConfig

BackboneConfig = Annotated[ResNetConfig | VGGConfig, Field(discriminator="kind")]
