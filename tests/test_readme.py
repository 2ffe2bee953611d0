"""What the README shows works as it stands there."""

import re

import pytest
import torch


@pytest.fixture
def readme(root):
    return (root / "README.md").read_text(encoding="utf-8")


def test_the_model_of_ones_own(readme):
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    scope: dict = {}
    exec(code, scope)
    torch.manual_seed(0)
    model = scope["Answerer"](vocab=50, answers=4)
    images, tokens = torch.randn(8, 3, 64, 64), torch.randint(4, 49, (8, 12))
    valid = torch.arange(12) < torch.randint(5, 13, (8, 1))
    answers = torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        logits, loss = model(images, tokens, valid)
        (torch.nn.functional.cross_entropy(logits, answers) + loss).backward()
        optimizer.step()
    assert (model.eval()(images, tokens, valid)[0].argmax(1) == answers).all()


def test_links_lead_somewhere(readme, root):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", readme)
    assert targets
    missing = [target for target in targets if not (root / target).exists()]
    assert not missing
