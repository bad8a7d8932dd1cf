"""The effect of Power-Law Decay on a finetuned model, beside methods without training: docs/evidence-protocol.md.

From the folder benchmarks, `make evidence` runs python -m evidence.fetch and python -m evidence.plan --budget 90m. Then
python -m evidence.report writes the page.
"""
