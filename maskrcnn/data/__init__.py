"""Datasets, transforms and data loaders."""

from typing import Annotated

from pydantic import Field

from maskrcnn.data.coco import CocoConfig
from maskrcnn.data.shapes import ShapesConfig

DatasetConfig = Annotated[CocoConfig | ShapesConfig, Field(discriminator="kind")]
