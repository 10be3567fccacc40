"""What has to be known of a causal model of transformers to run its decoder and its head apart."""

from typing import Any


def decoder_of(model: Any) -> Any:
    """The model without its head."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder  # Llama 4 names itself


def after_head(config: Any) -> tuple[float, float | None]:
    """What a model's forward does to its logits: a factor (Cohere, Granite), then a soft-cap (Gemma)."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1 / (getattr(text, "logits_scaling", None) or 1)
    return float(scale), getattr(text, "final_logit_softcapping", None)


def soft_capped_attention(config: Any) -> dict[str, str]:
    """Soft-capped attention (Gemma 2) by the plain implementation: transformers' SDPA leaves the cap out."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}
