"""Training: recipes, data and augmentation, distillation, and the one engine that train, distill and finetune share."""
