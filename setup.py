"""Packaging: the top-level folders install under the namespace `mede2` (`trainer/` as `mede2.trainer`, ...).

A top-level package called `kernels` would shadow the Hugging Face package of that name, which transformers imports.
"""

from pathlib import Path

from setuptools import setup

setup(
    name="mede2",
    version="0.1.0",
    description="Elicit and Enhance: two-stage post-training of medical vision-language models (arXiv 2505.23118)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={
        "mede2.trainer": "trainer",
        "mede2.trainer.answering": "trainer/answering",
        "mede2.trainer.data": "trainer/data",
        "mede2.trainer.demo": "trainer/demo",
        "mede2.trainer.doctor": "trainer/doctor",
        "mede2.trainer.evaluation": "trainer/evaluation",
        "mede2.trainer.planning": "trainer/planning",
        "mede2.trainer.preference": "trainer/preference",
        "mede2.trainer.questions": "trainer/questions",
        "mede2.kernels": "kernels",
    },
    packages=[
        "mede2.trainer",
        "mede2.trainer.answering",
        "mede2.trainer.data",
        "mede2.trainer.demo",
        "mede2.trainer.doctor",
        "mede2.trainer.evaluation",
        "mede2.trainer.planning",
        "mede2.trainer.preference",
        "mede2.trainer.questions",
        "mede2.kernels",
    ],
    package_data={
        "mede2.trainer.demo": ["*.yaml", "base/*"],
        "mede2.trainer.evaluation": ["report.html.jinja", "report.css", "report.js"],
        "mede2.trainer.preference": ["rubric.yaml", "report.html.jinja"],
    },
    install_requires=[
        "torch==2.13.0",
        "triton==3.7.1; platform_system == 'Linux'",
        "deepspeed==0.19.8",
        "transformers==5.23.0",
        "peft==0.21.2",
        "datasets==5.2.0",
        "bitsandbytes==0.50.2",
        "safetensors>=0.6,<1",
        "click>=8.1,<9",
        "numpy>=2,<3",
        "pillow>=11,<13",
        "pyyaml>=6,<7",
        "jinja2>=3.1,<4",
        "rich>=14,<16",
        "tensorboard>=2.20,<3",
    ],
    extras_require={
        "cuda": ["flash-attn>=2.8,<3"],
        "watch": ["wandb>=0.22,<1"],
        "pairs": [
            "imagehash>=4.3,<5",
            "krippendorff>=0.9,<1",
            "openai>=2,<3",
            "scikit-learn>=1.7,<2",
            "statsmodels>=0.15,<1",
        ],
        "bench": ["cut-cross-entropy==25.1.1", "liger-kernel==0.8.5", "matplotlib>=3.10,<4", "trl==1.16.0"],
        "test": [
            "hypothesis>=6,<7",
            "imagehash>=4.3,<5",
            "pytest>=8,<10",
            "pytest-timeout>=2.4,<3",
            "ruff>=0.14,<1",
            "trl==1.16.0",
            "wandb>=0.22,<1",
            "openai>=2,<3",
            "krippendorff>=0.9,<1",
            "scikit-learn>=1.7,<2",
            "statsmodels>=0.15,<1",
        ],
    },
)
