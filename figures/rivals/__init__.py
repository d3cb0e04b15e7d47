"""c-DTM against its rivals, on the maze where the answer is known.

    python -m figures.rivals --seeds 10     the table and the figure, an hour or more on 2 cores
    python -m figures.rivals --tune --first-seed 100 --seeds 4
                                            scores of neighbouring learning rates and rounds,
                                            on seeds that the table does not use

All methods start from the same base model, draw paths at temperature 1, and spend the same number
of network evaluations. A forward pass on one sequence counts 1, and a backward pass counts 2 more.
The passes of a teacher, a reference model and an old policy count, too. A small network counts by
its multiplications, and a look-up in a table counts as the pass that it stands for.

METRICS beside those of maze_lab.py
    kl_end         KL(rho_A || rho_theta) in nats; kl is the same against the current tilt rho_a
    kl_reverse     KL(rho_theta || rho_A) in nats
    target_kl, target_kl_reverse    kl_end and kl_reverse of the methods that aim at a tilt
    reward         E r under rho_theta
    kl_base        KL(rho_theta || rho_0) in nats
    frontier       min over a of KL(rho_theta || rho_a). The tilts are the frontier of reward
                   against KL to the base; this is the KL that the same reward could have saved.
    at_reward      the frontier distance at which the reward passes 0.9 along the run. It scores
                   methods without a target, whose reward grows until every path earns the same.
    evaluations    the network evaluations so far

objectives.py has a function per objective, frontier.py the metrics, and compare.py the methods, the
accounts, the runs and the figure. To add a method, write one function in objectives.py and add one
line to METHODS in compare.py.
"""
