"""GGUFMethods: the methods of Model that write GGUF files."""

import os
from functools import partial

from fastlora.arguments import FLAG, PATH, check_arguments
from fastlora.distributed.leading import on_first_rank
from fastlora.formats.gguf import adapter_file, model_file, ollama
from fastlora.formats.gguf.pre_tokenizers import pre_rule
from fastlora.formats.gguf.report import GGUFReport, OllamaReport
from fastlora.models.state import ModelState
from fastlora.text.tokenizer import TOKENIZER, Tokenizer


class GGUFMethods(ModelState):
    """Files for llama.cpp, Ollama and LM Studio. They need the extra `gguf`.

    Over a base that is sharded over ranks, all ranks must call these; rank 0 writes.
    """

    def save_gguf(
        self,
        path: str | os.PathLike[str],
        tokenizer: Tokenizer,
        dtype: str = "bf16",
        verify: bool = False,
        *,
        pre: str | None = None,
    ) -> GGUFReport:
        """Write a GGUF file with the adapter merged, for llama.cpp, Ollama and LM Studio.

        Args:
            path: of the file, in a folder that is created if it does not exist.
            tokenizer: the model's.
            dtype: "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4", "tq1_0"
                or "tq2_0". For a K-quant such as "q4_k_m", bfloat16 is written, and the report has
                the command that makes the K-quant.
            verify: run the file in llama.cpp, and report the largest difference of
                log-probabilities and the number of equal greedy ids.
            pre: llama.cpp's name of a pre-tokenizer, if it has none for the tokenizer's.

        Returns:
            Path, bytes, and sentences on what llama.cpp will do otherwise.

        Raises:
            ValueError: an argument is wrong, llama.cpp cannot run this model, a tensor would be NaN
                or infinite, or the path is that of a file that is not GGUF. No file is changed.
            CheckpointError: llama.cpp cannot tokenise as the tokenizer does.
            ModuleNotFoundError: the extra `gguf` is not installed.
            PermissionError: the folder cannot be written to.
            RuntimeError: with `verify`, llama.cpp cannot load the file. No file is changed.
        """
        check_arguments(
            "Model.save_gguf",
            path=(path, PATH),
            tokenizer=(tokenizer, TOKENIZER),
            dtype=(dtype, model_file.DTYPE),
            verify=(verify, FLAG),
            pre=(pre, pre_rule(pre)),
        )
        work = partial(model_file.save_gguf, self, path, tokenizer, dtype, verify, pre)
        return on_first_rank(self.base, work)

    def save_gguf_adapter(self, path: str | os.PathLike[str], verify: bool = False) -> GGUFReport:
        """Write the adapter as a GGUF LoRA file, for --lora of llama.cpp and Ollama's ADAPTER.

        Args:
            path: of the file, in a folder that is created if it does not exist.
            verify: run the file in llama.cpp, over a temporary file of the base in float32.

        Raises:
            ValueError: the model has no adapter, llama.cpp cannot run the model, or the format
                cannot hold the adapter: DoRA, lora_bias, trained embeddings and other copies, NaN
                and infinity. Or the path is that of a file that is not GGUF.
            ModuleNotFoundError: the extra `gguf` is not installed.
            PermissionError: the folder cannot be written to.
            RuntimeError: with `verify`, llama.cpp cannot load the file. No file is changed.
        """
        check_arguments("Model.save_gguf_adapter", path=(path, PATH), verify=(verify, FLAG))
        work = partial(adapter_file.save_gguf_adapter, self, path, verify)
        return on_first_rank(self.base, work)

    def save_ollama(
        self,
        folder: str | os.PathLike[str],
        tokenizer: Tokenizer,
        dtype: str = "q8_0",
        *,
        pre: str | None = None,
    ) -> OllamaReport:
        """Write a folder with GGUF files of base and adapter, and a Modelfile for `ollama create`.

        Args:
            folder: created if it does not exist.
            tokenizer: the model's.
            dtype: of the base, as for `save_gguf`.
            pre: as for `save_gguf`.

        Raises:
            ValueError, CheckpointError, ModuleNotFoundError, PermissionError: as `save_gguf`.
        """
        check_arguments(
            "Model.save_ollama",
            folder=(folder, PATH),
            tokenizer=(tokenizer, TOKENIZER),
            dtype=(dtype, model_file.DTYPE),
            pre=(pre, pre_rule(pre)),
        )
        work = partial(ollama.save_ollama, self, folder, tokenizer, dtype, pre)
        return on_first_rank(self.base, work)
