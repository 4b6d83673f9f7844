"""Where the packages lie; all else is in pyproject.toml. The folders kernels/ and ds_configs/ belong to bevt_ds."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
SUBPACKAGES = sorted(".".join(path.parent.relative_to(HERE).parts) for path in (HERE / "bevt_ds").rglob("__init__.py"))

setup(
    packages=[*SUBPACKAGES, "bevt_ds.kernels", "bevt_ds.ds_configs"],
    package_dir={"bevt_ds.kernels": "kernels", "bevt_ds.ds_configs": "ds_configs"},
    package_data={
        "bevt_ds.kernels": ["*.md", "*.json"],
        "bevt_ds.ds_configs": ["*.json"],
        "bevt_ds.report": ["*.html"],
    },
)
