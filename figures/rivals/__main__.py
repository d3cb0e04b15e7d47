from figures.rivals.compare import main

main()
