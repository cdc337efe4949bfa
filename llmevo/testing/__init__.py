"""Contract tests for parts of your own: merge methods, optimizers, LLM clients and engines. They need pytest.

Subclass a contract in a test file and give it the fixture that it names; pytest runs all its tests on your part:

    from llmevo.testing import MergeMethodContract

    class TestScaledSum(MergeMethodContract):
        @pytest.fixture
        def method(self):
            return SCALED_SUM

`pytest.register_assert_rewrite("llmevo.testing")` in your conftest.py makes pytest show the values of a failure.
"""

from llmevo.testing.clients import ClientContract
from llmevo.testing.engines import EngineContract
from llmevo.testing.merge_methods import MergeMethodContract
from llmevo.testing.optimizers import OptimizerContract

__all__ = ["ClientContract", "EngineContract", "MergeMethodContract", "OptimizerContract"]
