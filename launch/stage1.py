"""Stage I (elicit): supervised fine-tuning on text-only reasoning demonstrations."""

from mede2.trainer.commandline import stage_command

main = stage_command(1)

if __name__ == "__main__":
    main()
