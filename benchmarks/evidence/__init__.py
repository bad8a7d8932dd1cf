"""What Power-Law Decay does to a finetuned model, beside what costs no training: docs/evidence-protocol.md.

From the folder benchmarks: python -m evidence.fetch, then python -m evidence.plan --budget 90m, which `make evidence`
does; then python -m evidence.report.
"""
