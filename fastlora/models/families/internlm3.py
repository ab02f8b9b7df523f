"""InternLM3: Llama with other defaults, and with other names of the two switches for biases."""

from fastlora.models.families.family import (
    ALL_BIASES,
    ALL_ROPE,
    GGUF,
    NO_WINDOW,
    Family,
    TokenizerClass,
)

INTERNLM3 = Family(
    name="internlm3",
    models="InternLM3",
    defaults=dict(
        num_key_value_heads=2,
        head_dim=128,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    ),
    fixed={**NO_WINDOW, **ALL_ROPE},
    spellings=(("attention_bias", "qkv_bias"), ("mlp_bias", "bias")),
    one_bias=True,
    tokenizer_class=TokenizerClass("PreTrainedTokenizerFast", ignores_declared=True),
    peft_has_default=False,
    gguf=GGUF("llama", rope_of_neighbours=True, rope_factors=True, biases=ALL_BIASES),
)
