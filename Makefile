# From a fresh clone to results. Everything runs in .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
IN_VENV := .venv/bin

.PHONY: demo methods test quick bench lint clean

# Adaptive-rank LoRA on the bundled data and base, then its evaluation.
demo: .venv/installed
	$(IN_VENV)/python train/train_lora.py --val_path dataset/sample_news/val.jsonl --epochs 6
	$(IN_VENV)/python eval_llm_metrics.py --lora_weight lora_classifier
	@echo "rank report: out/lora/lora_classifier.ranks.png, learning curve: out/lora/lora_classifier_256.curve.png"

# All four methods on the bundled data, side by side.
methods: .venv/installed
	$(IN_VENV)/python train/train_lora.py --val_path dataset/sample_news/val.jsonl
	$(IN_VENV)/python train/train_adapter.py --val_path dataset/sample_news/val.jsonl
	$(IN_VENV)/python train/train_prompt_tuning.py --val_path dataset/sample_news/val.jsonl
	$(IN_VENV)/python train/train_projection_head.py --val_path dataset/sample_news/val.jsonl
	$(IN_VENV)/python eval_llm_metrics.py --compare

test: .venv/tested
	$(IN_VENV)/python -m pytest -q

quick: .venv/tested
	$(IN_VENV)/python -m pytest -q -m "not slow"

# Speed beside the way this project replaces and beside PEFT; run it on an otherwise idle machine.
bench: .venv/tested
	$(IN_VENV)/python tests/benchmarks/run.py

lint: .venv/tested
	$(IN_VENV)/ruff check .
	$(IN_VENV)/ruff format --check .

clean:
	rm -rf .venv out checkpoints

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(IN_VENV)/pip install -q -r requirements.txt
	touch $@

.venv/tested: .venv/installed tests/requirements.txt
	$(IN_VENV)/pip install -q -r tests/requirements.txt
	touch $@
