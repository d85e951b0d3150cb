"""The tiny world of the pipelines' tests."""

from tests.pipelines.conftest import tiny_world as tiny_world
