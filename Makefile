# SPDX-License-Identifier: Apache-2.0
# dmu-xen: see README.md. `make help` lists the targets.

SWIFT   ?= swift
DESTDIR ?=
PREFIX  ?= /usr
# One release build, shared by the suites, the lab, the benchmarks and `install`.
# Without the run path that SwiftPM gives: the runtime is static, and each start would look through
# fifty folders beside the program.
RELEASE  = -c release --static-swift-stdlib --disable-local-rpath --scratch-path .build-release
BIN      = .build-release/release
DIST     = .build-release/dist
# Two multi-call files, and the names under which they are other programs.
PROGRAMS = cowd dmu-xend
NAMES    = $(PROGRAMS) dmu-xen dmu-xl dmu-img dscow_tool
# A folder of zsh's fpath: Debian's zsh looks for what packages install elsewhere than others.
ZSH_FUNCTIONS ?= $(PREFIX)/share/zsh/$(if $(and $(wildcard /etc/debian_version),$(filter \
  /usr,$(PREFIX))),vendor-completions,site-functions)
SHELL_FILES = $(shell git grep -lE '^\#!/bin/(ba)?sh|^\# shellcheck shell=' -- . ':!*.md')

export SWIFT
export DMU_BIN_DIR = $(CURDIR)/$(BIN)

.PHONY: help build dist test kernel-lab check style run lab-shell install fuzz soak bench clean format deb rpm

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

build: ## build the programs (release, static Swift runtime)
	@lab/prerequisites build
	@# With another version of a package what is left out may be needed: then nothing is.
	DMU_PRODUCT=1 $(SWIFT) build $(RELEASE) || $(SWIFT) build $(RELEASE)

dist: build
	@rm -rf $(DIST)
	@$(MAKE) --no-print-directory install DESTDIR=$(CURDIR)/$(DIST) >/dev/null

run: ## boot a real Xen and run a guest from a dmu disk (10 minutes once, then under 2)
	@lab/prerequisites build xen
	@echo "run: building the programs and the lab side by side"
	@lab/xen/prepare >.lab-prepare.log 2>&1 & lab=$$!; \
	$(MAKE) --no-print-directory dist && wait $$lab || \
	{ status=$$?; tail -n 20 .lab-prepare.log; exit $$status; }
	@lab/xen/demo $(DIST)

test: ## every suite: unit, xenstored, NBD clients, the labs (25 minutes on two processors, longer the first time)
	@lab/prerequisites build test xen kernel module builds packages
	@echo "test: building the kernel lab's kernel beside the programs and the first suites"
	@lab/kernel/prepare >.lab-kernel.log 2>&1 & lab=$$!; \
	$(MAKE) --no-print-directory dist && Tests/all $(BIN) $(DIST); \
	status=$$?; kill $$lab 2>/dev/null; exit $$status

kernel-lab: ## the module's scenarios in a checked kernel (the kernel is built once)
	@lab/prerequisites build kernel
	@$(MAKE) --no-print-directory build
	lab/kernel/all --programs $(BIN)

check: style ## format, lint, warnings as errors, shellcheck, house rules, the models of the module
	Tests/run --build

style:
	@lab/prerequisites build check
	$(SWIFT) format lint --strict --recursive Package.swift Sources Tests fuzz
	shellcheck -x $(SHELL_FILES)
	Tests/house
	module/model/check

format: ## let swift format put the sources in order
	$(SWIFT) format --in-place --recursive Package.swift Sources Tests fuzz

lab-shell: ## an interactive dom0 on a real Xen, the programs in place
	@lab/prerequisites build xen
	@lab/xen/prepare
	@$(MAKE) --no-print-directory dist
	@lab/xen/shell $(DIST)

fuzz: build ## hostile images for every format, a minute for each target (20 minutes)
	@lab/prerequisites test
	fuzz/run --seconds 60

soak: dist ## the seeded suites for longer, with other seeds: DMU_DEPTH=10 times `make test`
	@lab/prerequisites check test kernel xen
	@lab/kernel/prepare >/dev/null
	Tests/soak $(BIN)

bench: dist ## measure against dm-linear, dm-snapshot, loop, qemu-nbd, qemu-img and a plain disk
	@lab/prerequisites bench xen module
	@status=0; for part in "bench/starts $(DIST)" bench/nbd "env FORMAT=qcow2 bench/nbd" \
	  bench/files bench/tebibyte bench/images lab/speed/run "env COUNTED=1 bench/guest-boot"; do \
	  echo "bench: $$part"; $$part || { echo "bench: MISSED: $$part"; status=1; }; done; exit $$status

install: ## install into $(DESTDIR)$(PREFIX), etc. into $(DESTDIR)/etc
	install -d $(DESTDIR)$(PREFIX)/sbin $(DESTDIR)$(PREFIX)/bin $(DESTDIR)/etc/xen/scripts \
	  $(DESTDIR)/lib/systemd/system
	install -s -m 755 $(PROGRAMS:%=$(BIN)/%) $(DESTDIR)$(PREFIX)/sbin/
	ln -sf dmu-xend $(DESTDIR)$(PREFIX)/sbin/dmu-xen
	ln -sf dmu-xend $(DESTDIR)$(PREFIX)/sbin/dmu-xl
	ln -sf ../sbin/cowd $(DESTDIR)$(PREFIX)/bin/dmu-img
	ln -sf ../sbin/cowd $(DESTDIR)$(PREFIX)/bin/dscow_tool
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/lib/dmu-xen hotplug/block-dmu
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/dmu-xen hotplug/hook-functions
	install -d -m 755 $(DESTDIR)/etc/dmu-xen/hooks/events.d
	@# Hooks that were edited stay.
	@for hook in hotplug/hooks/*; do to=$(DESTDIR)/etc/dmu-xen/hooks/$${hook##*/}; \
	sed 's|/usr/lib|$(PREFIX)/lib|' $$hook >$$to.new && chmod 755 $$to.new || exit 1; \
	if [ -e $$to ] && ! cmp -s $$to $$to.new; \
	then echo "install: $${to#$(DESTDIR)} is kept; the new one is $${to#$(DESTDIR)}.new"; \
	else mv $$to.new $$to; fi || exit 1; done
	sed 's|/usr/lib|$(PREFIX)/lib|' hotplug/block-dmu.start >$(DESTDIR)/etc/xen/scripts/block-dmu
	chmod 755 $(DESTDIR)/etc/xen/scripts/block-dmu
	@# A configuration that was edited stays.
	@if [ -e $(DESTDIR)/etc/dmu-xen.toml ] && ! cmp -s etc/dmu-xen.toml $(DESTDIR)/etc/dmu-xen.toml; \
	then to=dmu-xen.toml.new; echo "install: /etc/dmu-xen.toml is kept; the new one is /etc/$$to"; \
	else to=dmu-xen.toml; fi; install -m 644 etc/dmu-xen.toml $(DESTDIR)/etc/$$to
	for unit in etc/systemd/*.service; do \
	  sed 's|/usr/sbin/dmu-xen|$(PREFIX)/sbin/dmu-xen|' $$unit \
	    >$(DESTDIR)/lib/systemd/system/$${unit##*/} || exit 1; done
	chmod 644 $(DESTDIR)/lib/systemd/system/*.service
	install -d $(DESTDIR)/etc/libvirt/hooks/libxl.d
	sed 's|/usr/sbin/dmu-xen|$(PREFIX)/sbin/dmu-xen|' etc/libvirt/50-dmu-xen \
	  >$(DESTDIR)/etc/libvirt/hooks/libxl.d/50-dmu-xen
	chmod 755 $(DESTDIR)/etc/libvirt/hooks/libxl.d/50-dmu-xen
	install -D -m 644 -t $(DESTDIR)/usr/lib/udev/rules.d etc/09-dmu-xen.rules
	install -D -m 644 -t $(DESTDIR)/usr/lib/modprobe.d etc/modprobe.d/dmu-xen.conf
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/dmu-xen etc/grafana/dmu-xen.json
	@# Where cowd looks, whatever PREFIX is.
	install -d -m 755 $(DESTDIR)/usr/lib/dmu-xen/plugins
	install -d -m 755 $(DESTDIR)/var/lib/dmu-xen $(DESTDIR)/etc/dmu-xen/disks.d
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/include Sources/CPlugin/include/dmu_plugin.h \
	  Sources/DMUProtocol/include/dmu.h
	etc/completion/generate $(BIN) $(DESTDIR)$(PREFIX)/share $(DESTDIR)$(ZSH_FUNCTIONS) \
	  $(NAMES)
	$(MAKE) --no-print-directory -C module dkms DESTDIR=$(DESTDIR)
	for page in man/man*/*; do \
	  install -D -m 644 $$page $(DESTDIR)$(PREFIX)/share/$$page || exit 1; done
	for page in README.md CHANGELOG.md SECURITY.md $$(find docs examples -type f); do \
	  install -D -m 644 $$page $(DESTDIR)$(PREFIX)/share/doc/dmu-xen/$$page || exit 1; done

deb: dist ## Debian packages of the install tree, into .build-release/packages
	@lab/prerequisites packages
	packaging/deb $(DIST) .build-release/packages

rpm: dist ## RPM packages of the same, into .build-release/packages
	@lab/prerequisites packages
	packaging/rpm $(DIST) .build-release/packages

clean: ## remove what was built here (the cache of the labs stays)
	rm -rf .build .build-release .build-fuzz .build-tests .lab-prepare.log .lab-kernel.log
