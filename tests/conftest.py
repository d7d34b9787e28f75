"""Small real models and corpora that the tests share."""
