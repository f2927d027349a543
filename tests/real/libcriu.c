/* A client of libcriu (Debian's package criu): ACTION BINARY [DIR [PID]]. Its declarations are those of criu.h,
 * which needs headers that no other test does. */
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void *notify_arg;
int criu_init_opts(void);
int criu_set_service_binary(const char *path);
void criu_set_images_dir_fd(int fd);
void criu_set_pid(int pid);
void criu_set_log_level(int level);
int criu_set_log_file(const char *name);
void criu_set_notify_cb(int (*cb)(char *action, notify_arg arg));
int criu_check(void);
int criu_get_version(void);
int criu_dump(void);
int criu_restore_child(void);

static int told(char *action, notify_arg arg)
{
	(void)arg;
	printf("%s\n", action);
	return 0;
}

int main(int argc, char **argv)
{
	const char *action = argv[1];
	int result;

	if (argc < 3 || criu_init_opts() || criu_set_service_binary(argv[2]))
		return 2;
	if (argc > 3)
		criu_set_images_dir_fd(open(argv[3], O_RDONLY | O_DIRECTORY));
	else
		criu_set_images_dir_fd(open("/", O_RDONLY | O_DIRECTORY));
	criu_set_log_level(4);
	criu_set_log_file("libcriu.log");
	if (!strcmp(action, "version")) {
		result = criu_get_version();
		printf("%d\n", result);
		return result < 0;
	}
	if (!strcmp(action, "check"))
		return criu_check() != 0;
	criu_set_notify_cb(told);
	if (!strcmp(action, "dump")) {
		criu_set_pid(atoi(argv[4]));
		result = criu_dump();
	} else {
		result = criu_restore_child();
		printf("pid %d\n", result);
	}
	if (result < 0)
		fprintf(stderr, "%s: %d\n", action, result);
	return result < 0;
}
