"""The constitution as code: the document and its hashes, its form in Markdown, lint, differences, import of votes."""

from cai_ray.constitution.document import Constitution as Constitution
from cai_ray.constitution.document import Principle as Principle
from cai_ray.constitution.document import find as find
from cai_ray.constitution.document import load as load
from cai_ray.constitution.document import parse as parse
