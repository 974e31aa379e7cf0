"""What an evaluation counts is what the model says: the packaged models answer, to the letter, as in transformers."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tessera
from tessera.commands.local import LocalClient
from tessera.evals.run import Plan, evaluate
from tessera.evals.tasks import TASKS
from tessera.models.folder import find_model, packaged_models

NUM = 2


@pytest.mark.parametrize("name", packaged_models())
def test_answers_are_those_of_transformers(name: str) -> None:
    folder = find_model(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tessera.Engine(name, device="cpu", dtype="float32", log_level="warning") as engine:
        for task in TASKS.values():
            questions = task.questions("heldout", NUM, seed=11)
            ours = asyncio.run(evaluate(LocalClient(engine), task, questions, Plan()))
            for question, answer in zip(questions, ours.answers, strict=True):
                chat = [{"role": "user", "content": question.prompt}]
                prompt = tokenizer.apply_chat_template(
                    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
                whole = model.generate(**prompt, do_sample=False, max_new_tokens=task.max_tokens)
                said = whole[0, prompt["input_ids"].shape[1] :]
                assert answer.text == tokenizer.decode(said, skip_special_tokens=True)
                assert answer.num_tokens == len(said)
