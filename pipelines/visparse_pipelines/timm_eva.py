"""timm's `Eva`: EVA, EVA-02, DINOv3 and others with rotary positions, which are applied before attention is called."""

from visparse_pipelines.timm_vit import TimmAdapter, layout

ADAPTER = TimmAdapter(model_class="Eva", attention="blocks.*.attn", layout=layout)
