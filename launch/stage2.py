"""Stage II (enhance): preference alignment on multimodal pairs."""

from mede2.trainer.commandline import stage_command

main = stage_command(2)

if __name__ == "__main__":
    main()
