"""From cases to preference pairs: sample, judge, select, report, check. Files between the steps; each step resumes."""

from mede2.trainer.commandline import Commands

NAMES = ("demo-cases", "demonstrations", "sample", "judge", "select", "corrupt", "report", "check")
MODULES = {name: f"mede2.trainer.preference.{name.replace('-', '_')}" for name in NAMES}

main = Commands("pairs", __doc__, MODULES, extra="pairs")

if __name__ == "__main__":
    main()
