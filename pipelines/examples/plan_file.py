"""Write a plan of your own to a file, load it, and see what it would cost on a grid. Runs offline in seconds.

python pipelines/examples/plan_file.py
"""

import tempfile

from diffusers import WanTransformer3DModel

import visparse
from visparse.rules import Rule
from visparse.templates import PatternTemplate

plan = visparse.SparsePlan(
    name="near, with two wide heads",
    patterns={
        "near": PatternTemplate({"name": "neighborhood", "window": ["60%/2", "25%/8", "25%/8"], "stride": [4, 8, 8]}),
        "wide": PatternTemplate({"name": "neighborhood", "window": ["100%", "50%/8", "50%/8"], "stride": [4, 8, 8]}),
    },
    default="near",
    assignment=(Rule(pattern="wide", heads=[0, 1]),),
    dense_steps=0.2,
    dense_layers=1,
)

model = WanTransformer3DModel(num_attention_heads=4, attention_head_dim=64, num_layers=8, ffn_dim=256, text_dim=64)
with tempfile.TemporaryDirectory() as folder:
    print("written to", plan.save_pretrained(folder))
    with visparse.sparsify(model, folder):
        print(visparse.report(model, grid=(9, 32, 32)))
