"""Image classifiers on any LM: patches are what they say, order and time play no part but through positions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.models.vision import image_classifier
from lmlab.testing.tiny import lively, tiny_lm, tiny_tokenformer

MODELS = {"vit": tiny_lm, "tokenformer": tiny_tokenformer}
IMAGES = jax.random.normal(jax.random.key(1), (3, 4, 6, 2))


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    lm = MODELS[request.param](positions="learned", norm="layer")
    classifier = image_classifier(lm, (4, 6, 2), 2)
    return classifier, lively(classifier.init(jax.random.key(0)))


def test_every_pixel_matters_to_every_class_and_no_image_to_another(made):
    classifier, params = made
    slopes = jax.jit(jax.jacobian(lambda images: classifier.logits(params, images)))(IMAGES)
    chex.assert_shape(slopes, (3, 7, 3, 4, 6, 2))
    own = np.abs(np.stack([slopes[i, :, i] for i in range(3)]))
    assert np.all(own.sum(axis=1) > 0)
    others = [slopes[i, :, j] for i in range(3) for j in range(3) if i != j]
    assert not np.any(np.stack(others))


def test_patches_move_with_their_positions(made):
    classifier, params = made
    # The two patches of the first row change places, in the image and in the table of positions.
    moved = jnp.concatenate([IMAGES[:, :, 2:4], IMAGES[:, :, :2], IMAGES[:, :, 4:]], axis=2)
    table = params["trunk"]["position_embedding"]
    order = np.asarray([0, 2, 1, 3, 5, 4, 6])
    swapped = params | {"trunk": params["trunk"] | {"position_embedding": table.at[:7].set(table[order])}}
    wanted = classifier.logits(params, IMAGES)
    chex.assert_trees_all_close(classifier.logits(swapped, moved), wanted, atol=1e-5)
    assert not np.allclose(classifier.logits(params, moved), wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "patch", "message"),
    [
        ({"positions": "learned"}, 4, "patch = 4: expected a divisor of 4 and 6"),
        ({"positions": "learned", "max_length": 6}, 2, "model.max_length = 6: expected at least 7"),
        ({"positions": "rotary"}, 2, "model.positions = 'rotary': expected learned"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, patch, message):
    with pytest.raises(UserError, match=message):
        image_classifier(tiny_lm(**changes), (4, 6, 2), patch)


@pytest.mark.parametrize("shape", [(3, 4, 4, 2), (3, 4, 6, 1), (4, 6, 2)])
def test_images_of_another_size_are_named(made, shape):
    classifier, params = made
    with pytest.raises(UserError, match=r"images = .*: expected \[images, 4, 6, 2\]"):
        classifier.logits(params, jnp.zeros(shape))
