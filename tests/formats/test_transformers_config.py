"""transformers and this package load each other's folders with equal logits, and prepare photos alike."""

import pytest
import torch
from tiny_models import CLASSES, assert_same_answer, photo, randomise
from tiny_models import tiny_model as make

from deit_models import from_pretrained, transform_for


def test_transformers_loads_the_folder_with_equal_logits(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path, layout="transformers")
    theirs, report = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_answer(model, theirs.eval(), config=model.config, atol=1e-4)
    assert theirs.config.num_labels == model.num_classes
    if model.origin.class_names is not None:
        assert tuple(theirs.config.id2label.values()) == model.origin.class_names
        assert theirs.config.label2id["cat"] == 2
    if model.config.distilled:
        heads = model.forward_heads(torch.ones(1, 3, *model.config.image_hw))
        out = theirs(torch.ones(1, 3, *model.config.image_hw))
        torch.testing.assert_close(out.cls_logits, heads.cls, atol=1e-4, rtol=0)
        torch.testing.assert_close(out.distillation_logits, heads.dist, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (200, 200)])
def test_transformers_image_processor_prepares_a_photo_as_we_do(tmp_path, size):
    transformers = pytest.importorskip("transformers")
    tiny = make("deit_tiny_patch16_224")
    tiny.save_pretrained(tmp_path, layout="transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = photo(*size)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = transform_for(tiny)(image)
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 0.01  # Pillow rounds between its two passes; one grey level is 0.017
    assert (theirs - ours).abs().max() < 0.06


@pytest.mark.parametrize("distilled", [False, True])
def test_transformers_own_folder_loads_here(tmp_path, distilled):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    kind = "DeiT" if distilled else "ViT"
    head = "DeiTForImageClassificationWithTeacher" if distilled else "ViTForImageClassification"
    config = getattr(transformers, f"{kind}Config")(
        **shape, image_size=32, patch_size=8, id2label=dict(enumerate(CLASSES)), layer_norm_eps=1e-6
    )
    theirs = randomise(getattr(transformers, head)(config)).eval()
    theirs.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert (loaded.config.distilled, loaded.config.mlp_ratio, loaded.num_classes) == (distilled, 3.0, 7)
    assert loaded.origin.class_names == CLASSES
    assert_same_answer(loaded, theirs, config=loaded.config)
