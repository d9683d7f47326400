"""Any model that lmlab reads as a folder of transformers, without holding it in memory."""

from pathlib import Path

from lmlab.interop.families import read_config, write_config
from lmlab.interop.huggingface import TOKENS, write_folder
from lmlab.interop.pretrained import check_vocabulary, open_pretrained
from lmlab.interop.weights import check_tensors, model_parts


def convert(source_path: Path, target_path: Path, dtype: str = "float32") -> None:
    """Write what `load_pretrained` reads as a folder of transformers, tensor by tensor.

    Args:
        source_path: as for `load_pretrained`.
        target_path: a folder that is empty, or does not exist yet.
        dtype: of the weights there, "float32", "bfloat16" or "float16".

    Raises:
        UserError: the model cannot be read, or the folder cannot be written.
    """
    source, text = open_pretrained(source_path)
    config = read_config(source.config)
    check_vocabulary(source, config, text)
    parts = model_parts(config, source.config["model_type"])
    check_tensors(source, parts, config.tied)
    # The same family again: both sides name their tensors alike, so none has to be taken apart.
    shapes = {part.tensor: part.shape for part in parts}
    tokens = {name: source.config[name] for name in TOKENS if name in source.config}
    fields = tokens | write_config(config, source.config["model_type"])
    write_folder(target_path, fields, shapes, lambda name: source.read(name, ()), text, dtype=dtype)
