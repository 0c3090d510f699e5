from __future__ import annotations

from pathlib import Path

import pytest
from sourcerules import violations

PACKAGE = Path(__file__).parent.parent / "src" / "diffexp"
IMPORTERS = {"rewards/__init__.py", "rewards/custom.py", "own.py"}
"""Where a module may be imported by name: a shipped reward, and what the user names."""


def test_nothing_in_the_package_is_forbidden() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    found = {}
    for file in files:
        name = file.relative_to(PACKAGE).as_posix()
        if wrong := violations(file.read_text(encoding="utf-8"), may_import=name in IMPORTERS):
            found[name] = wrong
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "import yaml\nyaml.load(text)",
        "import random",
        "eval(text)",
        "exec(text)",
        "import builtins\nbuiltins.eval(text)",
        "from builtins import exec as run\nrun(text)",
        "import asyncio\nasyncio.create_subprocess_shell(command)",
        "from asyncio.subprocess import create_subprocess_shell\ncreate_subprocess_shell(command)",
        "import os\nos.posix_spawn(path, arguments, {})",
        "import os\nos.posix_spawnp(name, arguments, {})",
        "compile(text, name, 'exec')",
        "__import__(name)",
        "import os\nos.system(command)",
        "from os import system as run\nrun(command)",
        "import os\nos.execvp(name, arguments)",
        "import subprocess\nsubprocess.run(command, shell=True)",
        "import subprocess\nsubprocess.run(f'ls {folder}')",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load\nload(path)",
        "import torch\ntorch.save(state, path)",
        "import torch\ntorch.hub.load(repo, model)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import torch\ntorch.manual_seed(0)",
        "import torch\ntorch.cuda.manual_seed_all(0)",
        "import numpy as np\nnp.random.seed(0)",
        "from numpy import random as r\nr.normal()",
        "import torch\ntorch.randn(3)",
        "import torch\ntorch.randn_like(x)",
        "x.normal_()",
        "model.cuda()",
        "cls.from_pretrained(path, local_files_only=True, trust_remote_code=True)",
        "from transformers import AutoModel\nAutoModel",
        "import transformers as t\nt.AutoTokenizer.from_pretrained(path)",
        "from transformers.models.auto import AutoConfig\nAutoConfig()",
        "from diffusers import DiffusionPipeline\nDiffusionPipeline.from_pretrained(path)",
        "from diffusers import StableDiffusionPipeline as S\nS",
        "def f():\n    return CLIPModel.from_pretrained(path, use_safetensors=True)",
        "def f():\n    return CLIPModel.from_pretrained(path, local_files_only=True)",
        "import importlib\nimportlib.import_module(name)",
        "import tarfile\ntarfile.open(path)\ntarfile.TarFile.extractall(archive)",
        "import tempfile\ntempfile.mktemp()",
    ],
)
def test_what_is_forbidden_is_found(code: str) -> None:
    assert violations(code)


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(file, weights_only=True)",
        "import torch\ntorch.randn(3, generator=own)",
        "import numpy as np\nnp.random.default_rng(3).normal()",
        "from torch import Generator\nGenerator().manual_seed(3)",
        "import subprocess\nsubprocess.run(['ls', folder], shell=False)",
        "model.eval()",
        "import re\nre.compile(pattern)",
        "import importlib\nimportlib.import_module('datasets')",
        "from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL\nAutoencoderKL",
        "def f():\n    return CLIPTokenizer.from_pretrained(path, local_files_only=True)",
        "def f():\n    return CLIPModel.from_pretrained(path, use_safetensors=True, local_files_only=True)",
    ],
)
def test_what_is_allowed_is_not(code: str) -> None:
    assert not violations(code)
