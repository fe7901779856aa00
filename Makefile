# SPDX-License-Identifier: Apache-2.0
# What can be done with a checkout. Each target first makes sure that what it needs is there, so a
# fresh Debian machine with root, git and make is enough; `make help` lists them.

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -p no:cacheprovider
PACKAGES := vagrant/packages.txt
# What the time of a long run went into.
SLOWEST := --durations 20 --durations-min 4

# Folders that run on this machine's own kernel. A new folder under tests/ is one of them, unless
# it is named here: it would be worse to leave it out unnoticed.
ELSEWHERE := unit lvm bench demo support vectors
HOST_TESTS = $(foreach path,$(filter-out $(ELSEWHERE),$(notdir $(patsubst %/,%,$(wildcard tests/*/)))),tests/$(path))

# Thousands of commands are started by tests: without the files of compiled modules each compiles them all.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := bootstrap
.NOTPARALLEL:
.PHONY: help bootstrap format check test demo bench bench-extents bench-map bench-neighbour bench-restore
.PHONY: bench-subvolumes bench-tracked bench-trees bench-year vagrant-test clean
.PHONY: soak-btrfs soak-histories soak-instant soak-kill soak-model soak-power-cut soak-quiesce soak-simulation soak-tamper soak-thin
.PHONY: soak-guest soak-images soak-kinds soak-subvolumes soak-systemd soak-together soak-xfs
.PHONY: bootstrap-vagrant lint unit native-test host-test lab-test vagrant-validate

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

bootstrap: ## install what is missing, build the C core, make .venv (the default)
	@vagrant/bootstrap.sh $(PACKAGES)

demo: bootstrap ## a live database backed up, destroyed and restored, on real LVM
	vagrant/lab --timeout 900 -- $(BIN)/python tests/demo/run.py

check: bootstrap lint unit ## what needs neither root nor the lab, in under a minute

test: bootstrap-vagrant lint unit vagrant-validate native-test host-test lab-test ## everything, cheap things first

bench-subvolumes: bootstrap ## 100,000 files, 100 of them touched: an incremental backup beside a full one
	$(BIN)/python tests/bench/subvolumes.py

bench-trees: bootstrap ## a subvolume's backup read through the mounted tree, beside its restore
	$(BIN)/python tests/bench/tree_mount.py

bench: bootstrap ## measure against the peers on this machine
	$(BIN)/python tests/bench/run.py

bench-extents: bootstrap ## measure the engines of the extent diff beside their peers
	$(BIN)/python tests/bench/extents.py

bench-restore: bootstrap ## measure every form of restore beside restic and cp
	$(BIN)/python tests/bench/restoring.py

bench-map: bootstrap ## count the metadata that an incremental backup of 1 TiB writes
	$(BIN)/python tests/bench/metadata.py

bench-year: bootstrap ## a year of backups of 1 TiB without their data: prune, check, look-ups, memory (16 GiB, an hour)
	$(BIN)/python tests/bench/year.py

bench-neighbour: bootstrap ## a pgbench beside a backup, by the policies of pace: quiet machine, minutes
	$(BIN)/python tests/bench/neighbour.py

bench-tracked: bootstrap ## incrementals beside full compares of a thin volume, in the lab
	vagrant/lab --timeout 1800 --disk 3G --disk 3G -- $(BIN)/python tests/bench/tracked.py

soak-btrfs: bootstrap ## ROUNDS=10000 btrfs backups without a base, each compared with the truth
	$(BIN)/python tests/btrfs/soak.py --rounds $(or $(ROUNDS),10000)

soak-model: bootstrap ## every order of events of two writers and two collectors: half an hour, 3 GiB
	BLOCKSNAP_SOAK=1 $(PYTEST) -s tests/model

soak-thin: bootstrap ## compare thousands of random histories of a thin pool with the reference model
	BLOCKSNAP_EXAMPLES=2000 $(PYTEST) --timeout 3600 -n 2 tests/unit/native/test_thin_diff.py

soak-xfs: bootstrap ## 2,100 rounds of everything that happens to files, against the diff of their clones (XFS)
	XFS_ROUNDS=$${XFS_ROUNDS:-700} XFS_SEED=$${XFS_SEED:-1000} $(PYTEST) -n 2 -rP tests/xfs/test_fiemap_rounds.py

soak-subvolumes: bootstrap ## 20 rounds on a btrfs subvolume each way it is mounted, and all of /usr with packages of Debian
	BLOCKSNAP_SOAK_ROUNDS=20 $(PYTEST) --timeout 7200 -s tests/btrfs/test_subvolume_rounds.py
	BLOCKSNAP_SOAK=1 $(PYTEST) --timeout 7200 -s tests/btrfs/test_subvolume_packages.py

soak-btrfs-old: bootstrap ## all tests of btrfs on the kernel of the lab, 6.1: ten minutes
	vagrant/lab --timeout 5400 -- $(PYTEST) --timeout 1800 tests/btrfs

soak-images: bootstrap ## an image of 4 GiB on XFS and on btrfs, at work while it is backed up
	BLOCKSNAP_IMAGE_BYTES=4294967296 $(PYTEST) --timeout 3600 tests/conformance/test_images.py -k random_writes

soak-kinds: bootstrap ## 20 rounds of anything that happens, and a kill at every step, for each kind of volume
	BLOCKSNAP_SOAK_ROUNDS=20 BLOCKSNAP_SOAK=1 $(PYTEST) --timeout 3600 tests/conformance/test_kinds.py
	vagrant/lab --timeout 7200 --env BLOCKSNAP_SOAK_ROUNDS=20 --env BLOCKSNAP_SOAK=1 -- \
		$(PYTEST) --timeout 7000 tests/lvm/test_conformance.py tests/lvm/test_rounds.py tests/lvm/test_classic_layers.py

soak-histories: bootstrap ## the difference of thin devices against thin_delta, a hundred times as long, in the lab
	vagrant/lab --timeout 7200 --env BLOCKSNAP_SOAK_ROUNDS=100 -- $(PYTEST) --timeout 7000 \
		tests/lvm/test_thin_histories.py tests/lvm/test_thin_metadata.py -k 'random_histories or lock_free'

soak-kill: bootstrap ## a backup of a group, killed at every step, and what doctor --fix makes of it, in the lab
	vagrant/lab --timeout 3600 --env BLOCKSNAP_SOAK=1 -- $(PYTEST) --timeout 3600 tests/lvm/test_doctor.py

soak-quiesce: bootstrap ## twenty groups at one instant, and runs killed at every step they take, in the lab
	vagrant/lab --timeout 7200 --env BLOCKSNAP_SOAK_ROUNDS=20 -- $(PYTEST) --timeout 7000 tests/lvm/test_quiesce.py

soak-systemd: bootstrap ## timers, credentials and frozen units of a real systemd, in namespaces: minutes
	BLOCKSNAP_SOAK=1 BLOCKSNAP_SOAK_ROUNDS=10 $(PYTEST) --timeout 600 tests/systemd

soak-guest: ## a guest of libvirt with its agent, emulated, and backups whatever happens to either: minutes
	@vagrant/bootstrap.sh $(PACKAGES) vagrant/packages-vm.txt
	BLOCKSNAP_SOAK=1 $(PYTEST) --timeout 600 tests/guest

soak-instant: bootstrap ## instant restores: killed before every program, no repository, damage, in the lab: minutes
	vagrant/lab --timeout 3600 --env BLOCKSNAP_SOAK=1 -- $(PYTEST) -s --timeout 3000 \
		tests/lvm/test_instant.py tests/lvm/test_instant_endings.py tests/lvm/test_instant_failures.py tests/lvm/test_instant_targets.py

soak-tamper: bootstrap ## change every byte of every object, and see that it is noticed, and repaired: minutes
	BLOCKSNAP_SOAK=1 $(PYTEST) --timeout 3600 -n 2 tests/tampering tests/simulation/test_every_call_of_repair.py

soak-power-cut: bootstrap ## the power is cut at every flush under a repository, in the lab: half an hour
	vagrant/lab --timeout 7200 --env BLOCKSNAP_SOAK_EVERY=1 -- $(PYTEST) -s tests/lvm/test_power_cut.py

soak-together: bootstrap ## four processes back up, others prune, check and restore, kill -9 at random: ten minutes
	for seed in 1 2 3 4 5; do BLOCKSNAP_SOAK_SECONDS=120 BLOCKSNAP_FIRST_SEED=$$seed \
		$(PYTEST) -s tests/host/test_together.py || exit 1; done

soak-simulation: bootstrap ## 100,000 seeds of the simulated repository, a thousand at a time on two cores: two hours
	seq 0 1000 99000 | xargs -P 2 -I{} env BLOCKSNAP_SEEDS=1000 BLOCKSNAP_FIRST_SEED={} \
		$(PYTEST) -q tests/simulation/test_simulation.py

vagrant-test: bootstrap-vagrant ## bring a Vagrant VM up, run the LVM and btrfs tests in it, destroy it
	vagrant/vagrant-test.sh

format: bootstrap ## lay out the sources, Python and C
	$(BIN)/ruff format . vagrant/lab
	$(BIN)/ruff check --fix . vagrant/lab
	find native -name '*.[ch]' -exec clang-format -i {} +
	clang-format --style=file:native/.clang-format -i vagrant/*.c

clean: ## remove what was built, .venv included
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- the parts of check and test ---

bootstrap-vagrant:
	@vagrant/bootstrap.sh $(PACKAGES) vagrant/packages-vagrant.txt

lint:
	$(BIN)/ruff check --output-format concise . vagrant/lab
	$(BIN)/ruff format --check . vagrant/lab
	find native -name '*.[ch]' -exec clang-format --dry-run -Werror {} +
	clang-format --style=file:native/.clang-format --dry-run -Werror vagrant/*.c
	$(BIN)/mypy
	$(BIN)/mypy vagrant/lab

# Three workers on two cores: tests that wait for programs leave a core to others.
unit:
	$(PYTEST) -n 3 tests/unit tests/demo

vagrant-validate:
	cd vagrant && vagrant validate

native-test:
	cmake -S native -B build/native-test -G Ninja -DBLOCKSNAP_SANITIZE=ON
	cmake --build build/native-test -j 2
	ctest --test-dir build/native-test --output-on-failure

host-test:
	$(PYTEST) $(SLOWEST) -n 3 $(HOST_TESTS)

# Two labs at once, one for each core; the second one's output follows the first one's.
LAB_SECOND := $(addprefix tests/lvm/test_,thin_bases.py thin_histories.py thin_metadata.py thin_time_limit.py thin_volume.py \
	classic.py guard.py power_cut.py quiesce_commands.py quiesce_databases.py \
	restore_failures.py restore_in_place.py instant.py instant_endings.py instant_failures.py instant_targets.py)
lab-test:
	@mkdir -p build
	@vagrant/lab --timeout 7200 -- $(PYTEST) $(SLOWEST) --timeout 900 $(LAB_SECOND) > build/lab-second.log 2>&1 & \
	second=$$!; \
	vagrant/lab --timeout 7200 -- $(PYTEST) $(SLOWEST) --timeout 900 $(addprefix --ignore ,$(LAB_SECOND)) tests/lvm; \
	rest=$$?; wait $$second; code=$$?; cat build/lab-second.log; echo "the labs ended with $$rest and $$code"; \
	test $$rest -eq 0 && test $$code -eq 0
