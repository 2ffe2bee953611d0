"""Data: an embedded corpus, the field's formats, tokenizer, masking, transforms, and the mixer of three streams."""

from vlblocks.data.batching import Collate, image_batches, pad_tokens, text_batches
from vlblocks.data.formats import Layout, Subset, locate, read_image_folder, read_karpathy, read_texts, split_pairs
from vlblocks.data.masking import MaskedTokens, SpanMasking
from vlblocks.data.scenes import SceneCorpus
from vlblocks.data.sources import (
    BadData,
    BadExampleError,
    CaptionedImages,
    Gallery,
    ImageFiles,
    ImageSource,
    Skipped,
    read_image,
)
from vlblocks.data.streams import EpochBatches, ImageDataset, PairDataset, StreamMixer, TextDataset, stream_loader
from vlblocks.data.tokenizer import Tokenizer, load_hf_bpe, load_roberta_bpe, train_tokenizer
from vlblocks.data.transforms import ImageTransform, TwoViews, eval_transform, seeded, train_transform
from vlblocks.data.world import Scene, Thing, render

__all__ = [
    "BadData",
    "BadExampleError",
    "CaptionedImages",
    "Collate",
    "EpochBatches",
    "Gallery",
    "ImageDataset",
    "ImageFiles",
    "ImageSource",
    "ImageTransform",
    "Layout",
    "MaskedTokens",
    "PairDataset",
    "Scene",
    "SceneCorpus",
    "Skipped",
    "SpanMasking",
    "StreamMixer",
    "Subset",
    "TextDataset",
    "Thing",
    "Tokenizer",
    "TwoViews",
    "eval_transform",
    "image_batches",
    "load_hf_bpe",
    "load_roberta_bpe",
    "locate",
    "pad_tokens",
    "read_image",
    "read_image_folder",
    "read_karpathy",
    "read_texts",
    "render",
    "seeded",
    "split_pairs",
    "stream_loader",
    "text_batches",
    "train_tokenizer",
    "train_transform",
]
