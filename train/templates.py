"""Captions for pictures of a thing that has no words yet (Gal et al. 2022, arXiv:2208.01618, section 4).

A new word is taught in sentences that say nothing else of the picture: drawn at random, so that it takes on
what all pictures have in common. As many as in diffusers' script, in our own words; `{}` is the new word.
"""

OBJECT = (
    "a picture of {}",
    "a picture of a {}",
    "a photograph of {}",
    "a photograph of one {}",
    "a snapshot of the {}",
    "a close view of {}",
    "a close view of the {}",
    "a distant view of {}",
    "a sharp picture of {}",
    "a blurred picture of the {}",
    "a bright photograph of {}",
    "a dim photograph of {}",
    "a fine picture of my {}",
    "a poor picture of {}",
    "a large picture of {}",
    "a small picture of the {}",
    "a cropped view of {}",
    "the whole of {}",
    "{} in full view",
    "{} seen from the front",
    "{} in the middle of the picture",
    "here is {}",
    "this is a {}",
    "an image that shows {}",
    "an image of that {}",
    "a plain image of {}",
    "nothing but {}",
)

STYLE = (
    "a picture in the style of {}",
    "a painting in the style of {}",
    "a drawing in the style of {}",
    "a work in the manner of {}",
    "an artwork after {}",
    "a scene as {} would show it",
    "a detail in the style of {}",
    "a large picture in the style of {}",
    "a small picture in the style of {}",
    "a bright picture in the style of {}",
    "a dark picture in the style of {}",
    "a quiet scene in the style of {}",
    "a lively scene in the style of {}",
    "a rough sketch in the style of {}",
    "a finished piece in the style of {}",
    "a cropped picture in the style of {}",
    "the look of {}",
    "something drawn the way of {}",
    "an image made in {} style",
)
