"""Teach a small model to write kitchen tickets; about three minutes on two cores. --smoke trains two steps."""

import sys
import tempfile

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer, train_on_responses_only
from unsloth.data import demo

smoke = "--smoke" in sys.argv
output = tempfile.mkdtemp(prefix="finetune-") if smoke else "outputs/finetune"

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="embedded:SmolLM2-135M-Instruct",  # or a hub id, or a folder
    max_seq_length=256,
    load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, use_gradient_checkpointing=False)

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=demo.train_rows(),  # or any data set with "messages" or "text"
    args=SFTConfig(
        output_dir=output,
        max_steps=2 if smoke else 56,
        per_device_train_batch_size=2 if smoke else 8,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
    ),
)
trainer = train_on_responses_only(trainer)
trainer.train()

FastLanguageModel.for_inference(model)
messages = demo.heldout_rows()[0]["messages"][:-1]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").to(model.device)
answer = model.generate(input_ids=inputs, max_new_tokens=40, do_sample=False)
print(messages[-1]["content"], "->", tokenizer.decode(answer[0, inputs.shape[1] :], skip_special_tokens=True))

model.save_pretrained(f"{output}/adapter")
tokenizer.save_pretrained(f"{output}/adapter")
