"""Installs m2l; tasks/ becomes the package m2l.tasks and gin_configs/ becomes m2l.gin_configs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "m2l/version.py").read_text(), re.M)[1]

# requirements.lock pins what the tests ran on. An upper bound stands where releases change names or
# defaults: jax (make_mesh's axis types) and Orbax's v1 API do, in every minor release.
REQUIREMENTS = [
    "absl-py>=2.1",
    "click>=8.1",
    "datasets>=4.0",
    "filelock>=4.2",
    "flax>=0.12.8",
    "gin-config>=0.5.0",
    "huggingface-hub>=0.34",
    "jax>=0.10.2,<0.11",
    "jinja2>=3.1.6",
    "markupsafe>=2.1",
    "matplotlib>=3.9",
    "ml-dtypes>=0.5",
    "msgpack>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint==0.12.*",
    "packaging>=24.0",
    "pandas>=2.2",
    "psutil>=5.9",
    "pyarrow>=18.0",
    "pyyaml>=6.0",
    "regex>=2024.11.6",
    "rich>=13.0",
    "sentencepiece>=0.2",
    "seqio>=0.0.20",
    # Not tensorflow-cpu, although TensorFlow only feeds data: seqio needs tensorflow-text, which
    # asks for the name tensorflow, and pip would put both builds into one folder.
    # requirements.lock, installed without following dependencies, takes the smaller build.
    "tensorflow>=2.21",
    "tensorflow-datasets>=4.9.10",
    # tensorflow-datasets 4.9.10 imports it and asks for it only on Pythons older than ours.
    "importlib-resources>=6.0",
    "tensorboardX>=2.6",
    "tensorstore>=0.1.84",
    "tokenizers>=0.21",
    # t5 itself is not here: it asks for seqio-nightly and tfds-nightly, which overwrite seqio and
    # tensorflow-datasets file by file. `pip install --no-deps t5==0.9.4` adds its preprocessors
    # and metrics; the following are what these import.
    "babel>=2.12",
    "editdistance>=0.8",
    "immutabledict>=4.0",
    "nltk>=3.9",
    "rouge-score>=0.1.2",
    "sacrebleu>=2.4",
    "scikit-learn>=1.5",
    "scipy>=1.14",
    "six>=1.16",
]

setup(
    name="m2l",
    version=VERSION,
    description="Train experts from one base, merge them in weight space, measure the merge.",
    # Images for clusters are built without README.
    long_description=README.read_text() if README.is_file() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=REQUIREMENTS,
    extras_require={
        # JAX for accelerators; without one of the two it computes on CPUs.
        "gpu": ["jax[cuda13]>=0.10.2,<0.11"],
        "tpu": ["jax[tpu]>=0.10.2,<0.11"],
        "hf": [],  # What reads the Hugging Face Hub is always there.
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.29"],
        "gguf": ["gguf>=0.17"],
        "lm_eval": ["lm_eval>=0.4.13,<0.5"],
        "test": [
            # The four serve Google Cloud Storage and S3 in the tests' process, and let Orbax reach
            # the former there: TensorFlow's files, its default, know Google's own address alone.
            "axe-core-python>=0.1",
            "flask>=3.0",
            "flask-cors>=5.0",
            "gcp-storage-emulator>=2024.8.3",
            "gcsfs>=2025.1",
            "gguf>=0.17",
            "hypothesis>=6.100",
            "moto[s3]>=5.0",
            "pyrefly>=1.5",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "safetensors>=0.5",
        ],
        "search": ["cmaes>=0.12", "optuna>=5.0", "psycopg[binary]>=3.2", "sqlalchemy>=2.0.40"],
        "slurm": ["submitit>=1.5"],
        "ui": ["flask>=3.0"],
        "wandb": ["wandb>=0.19"],
    },
    packages=[
        *find_packages(include=["m2l", "m2l.*"], exclude=["m2l.tasks*"]),
        "m2l.gin_configs",
        "m2l.tasks",
        *(f"m2l.tasks.{name}" for name in find_packages("tasks")),
    ],
    package_dir={"m2l.gin_configs": "gin_configs", "m2l.tasks": "tasks"},
    package_data={
        "m2l.gin_configs": ["**/*.gin"],
        "m2l.tasks": ["**/*.model", "*.csv"],
        "m2l.reporting": ["*.jinja", "*.csv"],
        "m2l.studies": ["*.json"],
    },
    entry_points={"console_scripts": ["m2l = m2l.cli:main"]},
    zip_safe=False,
)
