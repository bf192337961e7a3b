"""Learning to explain: a rating from k words of a review."""

from structgrad.tasks.l2x.beeradvocate import BeerAdvocate as BeerAdvocate
from structgrad.tasks.l2x.json_reviews import JsonReviews as JsonReviews
from structgrad.tasks.l2x.json_reviews import MovieRationales as MovieRationales
from structgrad.tasks.l2x.planted_reviews import PlantedReviews as PlantedReviews
from structgrad.tasks.l2x.sentiment_treebank import SentimentTreebank as SentimentTreebank
from structgrad.tasks.l2x.task import L2X as L2X
