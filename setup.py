"""Packaging of bevt_ds. The top-level folders kernels/ and ds_configs/ are bevt_ds.kernels and bevt_ds.ds_configs."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
SUBPACKAGES = sorted(".".join(path.parent.relative_to(HERE).parts) for path in (HERE / "bevt_ds").rglob("__init__.py"))

setup(
    name="bevt_ds",
    version="0.1.0",
    description="BEVT video pretraining: WebDataset, DALI, DeepSpeed ZeRO and Triton kernels",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*SUBPACKAGES, "bevt_ds.kernels", "bevt_ds.ds_configs"],
    package_dir={"bevt_ds.kernels": "kernels", "bevt_ds.ds_configs": "ds_configs"},
    package_data={"bevt_ds.kernels": ["*.md", "*.json"], "bevt_ds.ds_configs": ["*.json"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "triton>=3.6,<3.8; platform_system == 'Linux'",
        "timm>=1.0.31",
        "webdataset>=1.0.2",
        "nvidia-dali-cuda130>=2.4",
        "einops>=0.8.2",
        "av>=18.1,<19",
        "numpy>=2",
        "safetensors>=0.5",
        "tensorboard>=2.20",
        "matplotlib>=3.9",
        "pillow>=11",
        "tqdm>=4.66",
        "fsspec>=2024.6",
        "pyarrow>=17",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-timeout",
            "hypothesis",
            "opencv-python-headless",
            "torchvision",
        ],
        "lint": ["ruff"],
        # benchmarks only; torchcodec needs FFmpeg's shared libraries too (Debian: apt-get install ffmpeg)
        "bench": ["torchcodec>=0.17", "torchvision"],
    },
    entry_points={"console_scripts": ["bevt = bevt_ds.cli:main"]},
)
