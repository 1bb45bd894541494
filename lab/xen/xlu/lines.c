// SPDX-License-Identifier: Apache-2.0
// lines: parses disk lines with libxlutil and prints what it makes of each, in a line.
//
//   lines <LINES     fields of a line that are separated by tabs are arguments of their own
#include <libxl.h>
#include <libxlutil.h>
#include <stdio.h>
#include <string.h>

static const char *shown(const char *text)
{
	return text ? text : "-";
}

int main(void)
{
	char line[4096];

	while (fgets(line, sizeof(line), stdin)) {
		const char *words[8];
		int count = 0, result;
		libxl_device_disk disk;
		XLU_Config *config = xlu_cfg_init(stderr, "line");

		if (!config)
			return 1;
		line[strcspn(line, "\n")] = '\0';
		for (char *word = strtok(line, "\t"); word && count < 8; word = strtok(NULL, "\t"))
			words[count++] = word;
		libxl_device_disk_init(&disk);
		result = xlu_disk_parse(config, count, words, &disk);
		if (result)
			printf("refused %d\n", result);
		else
			printf("target=%s vdev=%s script=%s format=%d mode=%d cdrom=%d backend=%s\n",
			       shown(disk.pdev_path), shown(disk.vdev), shown(disk.script),
			       (int)disk.format, disk.readwrite, disk.is_cdrom,
			       shown(disk.backend_domname));
		libxl_device_disk_dispose(&disk);
		xlu_cfg_destroy(config);
	}
	return 0;
}
