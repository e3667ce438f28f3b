# What someone does first with the installed package alone; `make wheel` runs it in a clean environment.
run=$(mktemp -d)/first
echo 'import deepdelta, importlib.metadata as m; assert m.version("deep-delta-learning") == deepdelta.__version__' | python -
python - <<'EOF'
import re
from importlib.metadata import metadata

page = metadata("deep-delta-learning").get_payload()
assert "# Deep Delta Learning" in page and "](https://arxiv.org" in page
assert not re.findall(r"\]\((?!https?:)|^\[[^\]]+\]:|<img|<a ", page, re.M)  # would lead nowhere on a package index
assert "named here without a link" in page
urls = dict(one.split(", ", 1) for one in metadata("deep-delta-learning").get_all("Project-URL"))
assert urls and all(url.startswith("https://") and url in page for url in urls.values())
EOF
deepdelta --help > /dev/null
deepdelta train "$run" --preset delta-token-random --steps 20 --warmup 2 --batch-size 2 --eval-tokens 1024 --final-eval-tokens 1024 \
    --model.dim 32 --model.heads 2 --model.layers 2 --model.context 32
deepdelta generate "$run" --prompt "def " --tokens 20
deepdelta evaluate "$run" --tokens 1024
deepdelta explore --out "$run/operator.html"
deepdelta explore "$run" --prompt "def f(x)"
test -s "$run/operator.html" -a -s "$run/explore.html" -a -s "$run/explore.json"
python - <<'EOF'
import torch, deepdelta

stream = deepdelta.DeltaStream(dim=16, value_channels=4)
block = stream.wrap(torch.nn.Linear(16, 16))
x = torch.randn(2, 5, 16)
assert stream.reduce(block(stream.expand(x))).shape == x.shape
layer = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
expected = layer(x)
assert (deepdelta.retrofit(layer)(x) - expected).abs().max() < 1e-5
EOF
