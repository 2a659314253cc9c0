"""The public API: the one list from which lazy loading, ``__all__`` and type checkers take their
names.
"""

from smalto.core.errors import SmaltoError as SmaltoError
from smalto.core.layout import TokenLayout as TokenLayout
from smalto.generator import Generator as Generator
from smalto.generator import load_generator as load_generator
from smalto.images.single_image import read_image as read_image
from smalto.images.single_image import write_png as write_png
from smalto.interop.open_tokenizer import load as load
from smalto.pipelines.convert import convert as convert
from smalto.pipelines.decode import decode as decode
from smalto.pipelines.demo import demo as demo
from smalto.pipelines.evaluate import compare as compare
from smalto.pipelines.evaluate import evaluate as evaluate
from smalto.pipelines.generate import generate as generate
from smalto.pipelines.info import info as info
from smalto.pipelines.reconstruct import reconstruct as reconstruct
from smalto.pipelines.tokenize import tokenize as tokenize
from smalto.pipelines.train import resume as resume
from smalto.pipelines.train import train as train
from smalto.pipelines.verify import verify as verify
from smalto.quantizers import CodebookUpdater as CodebookUpdater
from smalto.quantizers import Revive as Revive
from smalto.quantizers import VectorQuantizer as VectorQuantizer
from smalto.store.dataset import TokenDataset as TokenDataset
from smalto.store.dataset import TokenLoader as TokenLoader
from smalto.store.exports import export_store as export_store
from smalto.store.exports import import_store as import_store
from smalto.store.schema import StoreHeader as StoreHeader
from smalto.store.schema import TokenRow as TokenRow
from smalto.store.token_store import TokenStore as TokenStore
from smalto.tokenizer import ImageTokenizer as ImageTokenizer
from smalto.tokenizer import SimpleVQVAE as SimpleVQVAE
from smalto.tokenizer import TokenizerConfig as TokenizerConfig
from smalto.tokenizer import default_tokenizer as default_tokenizer
from smalto.training.generator_recipe import GeneratorRecipe as GeneratorRecipe
from smalto.training.recipe_file import load_recipe as load_recipe
from smalto.training.tokenizer_recipe import TokenizerRecipe as TokenizerRecipe

__version__: str
