"""Datasets, transforms and the loader that turns them into batches."""

from typing import Annotated

from pydantic import Field

from maskrcnn.data.coco import CocoConfig
from maskrcnn.data.shapes import ShapesConfig

DatasetConfig = Annotated[CocoConfig | ShapesConfig, Field(discriminator="kind")]
