"""Does a model reason better, and does it look at the image? Benchmarks, scaling, grounding probes, one report."""

from mede2.trainer.commandline import Commands

MODULES = {
    "list": "mede2.trainer.evaluation.list_benchmarks",
    "run": "mede2.trainer.evaluation.run",
    "report": "mede2.trainer.evaluation.report",
}

main = Commands("evaluate", __doc__, MODULES, extra="pairs")

if __name__ == "__main__":
    main()
