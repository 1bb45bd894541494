// SPDX-License-Identifier: Apache-2.0
/*
 * init.c: process 1 of a guest. Mounts what there is to mount, loads xen-blkfront, and obeys
 * the kernel's command line first and then, line by line, the console. Told `boot:DEV` it runs
 * boot.sh with the file system of that disk as its root (its own boot.sh, if that has one), and
 * says how old the guest then is.
 */
#include "labio.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

static void load_modules(const char *list)
{
	FILE *order = fopen(list, "r");
	char path[256];

	while (order && fgets(path, sizeof(path), order)) {
		path[strcspn(path, "\n")] = 0;
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		/* Another list had it, or the processor is none for it. */
		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST &&
			       errno != ENODEV))
			printf("LAB error module %s: %s\n", path, strerror(errno));
		close(fd);
	}
	if (order)
		fclose(order);
}

int add_modules(const char *name)
{
	char path[96];

	snprintf(path, sizeof(path), "/lib/modules/order-%s", name);
	if (access(path, R_OK))
		return fail("%s: %s", path, strerror(errno));
	load_modules(path);
	return 0;
}

int boot_disk(const char *name)
{
	char path[96];
	int script, status;
	pid_t child;

	load_modules("/lib/modules/order-boot");
	snprintf(path, sizeof(path), "/dev/%s", name);
	mkdir("/root", 0755);
	if (mount(path, "/root", "ext4", 0, ""))
		return fail("%s: %s", path, strerror(errno));
	script = open("/root/boot.sh", O_RDONLY | O_CLOEXEC);
	if (script < 0)
		script = open("/boot.sh", O_RDONLY | O_CLOEXEC);
	if (script < 0)
		return fail("boot.sh: %s", strerror(errno));
	if (mount("/dev", "/root/dev", NULL, MS_BIND, ""))
		return fail("/root/dev: %s", strerror(errno));
	child = fork();
	if (child == 0) {
		dup2(script, 0);
		if (!chroot("/root") && !chdir("/"))
			execl("/bin/bash", "bash", NULL);
		_exit(127);
	}
	if (child < 0 || waitpid(child, &status, 0) != child)
		return fail("boot.sh: %s", strerror(errno));
	if (status)
		return fail("boot.sh ended with %#x", status);
	/* The kernel's clock begins with the guest. */
	snprintf(reason, sizeof(reason), "%.2f", now());
	if (umount("/root/dev") || umount("/root"))
		return fail("%s: %s", path, strerror(errno));
	return 0;
}

static void open_console(void)
{
	struct termios t;
	int fd = open("/dev/hvc0", O_RDWR);

	if (fd < 0)
		fd = open("/dev/console", O_RDWR);
	for (int i = 0; i < 3; i++)
		dup2(fd, i);
	if (tcgetattr(0, &t) == 0) {
		t.c_lflag &= ~ECHO;	/* an order must not look like its answer */
		tcsetattr(0, TCSANOW, &t);
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	setvbuf(stdin, NULL, _IONBF, 0);
}

_Noreturn void guest_main(void)
{
	char line[1024] = "", *orders, *order;
	FILE *f;

	is_init = true;
	mount("proc", "/proc", "proc", 0, "");
	mount("sysfs", "/sys", "sysfs", 0, "");
	mount("dev", "/dev", "devtmpfs", 0, "");
	open_console();
	load_modules("/lib/modules/order");
	puts("LAB up");
	f = fopen("/proc/cmdline", "r");
	if (f && fgets(line, sizeof(line), f) && (orders = strstr(line, "lab="))) {
		orders += 4;
		orders[strcspn(orders, " \n")] = 0;
		while ((order = strsep(&orders, ",")))
			obey(order);
	}
	puts("LAB listening");
	for (;;) {
		if (!fgets(line, sizeof(line), stdin)) {
			clearerr(stdin);
			sleep(1);
			continue;
		}
		line[strcspn(line, "\r\n")] = 0;
		obey(line);
	}
}
