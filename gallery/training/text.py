"""The small text side: a word-level tokenizer and a two-layer UMT5 encoder, both stock classes."""

import torch
import torch.nn.functional as F
from data import captions
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_DIM = 128
TEXT_LENGTH = 512  # what WanPipeline pads prompts to


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the training captions; `</s>` ends a prompt."""
    words = sorted({word for text in captions() for word in text.replace(",", " , ").split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LENGTH
    )


def build_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A new encoder for so many tokens."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    encoder = UMT5EncoderModel(config)
    with torch.no_grad():
        encoder.shared.weight.normal_(0, 1.0)
    return encoder


class Captions:
    """Embeddings of all training captions, padded as `WanPipeline` pads them: `[n, 512, 128]`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> None:
        batch = tokenizer(captions(), padding=True, return_tensors="pt")
        self.ids, self.mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        self.empty = len(self.ids) - 1

    def embed(self, encoder: UMT5EncoderModel) -> torch.Tensor:
        """Embeddings by the present weights of `encoder`; padding is 0."""
        hidden = encoder(self.ids, self.mask).last_hidden_state * self.mask[..., None]
        return F.pad(hidden, (0, 0, 0, TEXT_LENGTH - hidden.shape[1]))
