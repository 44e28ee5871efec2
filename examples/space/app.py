"""The demo of deit-models as a Hugging Face Space; `python app.py` serves it on this computer."""

import os

from deit_models.show.demo import build_app, serve

# These come with the package. Others of `deit-models list`, and repositories of the Hub, are downloaded at the start.
MODELS = ["deit_micro_distilled_patch4_32", "deit_micro_patch4_32"]

app = build_app(MODELS)

if __name__ == "__main__":
    # a Space names its address in this variable
    serve(app, host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), announce=print)
