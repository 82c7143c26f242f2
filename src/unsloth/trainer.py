"""The documented names of the trainer for continued pretraining, which is supervised fine-tuning.

``embedding_learning_rate`` gives the embeddings and the output head a learning rate of their own.
"""

from unsloth.train.config import SFTConfig
from unsloth.train.sft import SFTTrainer

UnslothTrainer = SFTTrainer
UnslothTrainingArguments = SFTConfig

__all__ = ["UnslothTrainer", "UnslothTrainingArguments"]
