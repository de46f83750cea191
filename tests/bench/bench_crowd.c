/* The benchmark's readers in C: opens N WebSocket connections, and counts or compares every byte that comes.
 *
 * bench_fanout.py compiles and runs it, and tells it in lines of JSON on stdin what to do. A Python loop opens connections no faster than the servers accept them. Linux only: epoll.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define REQUEST                                                                                  \
    "GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"        \
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
#define ACCEPT "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" /* RFC 6455, 1.3 */
#define MOST_HEAD 4096                        /* bytes of an answer's head */
#define MOST_EVENTS 512
#define CONNECT_TIMEOUT 30.0 /* seconds, and the two of bench_fanout.py */
#define ROUND_TIMEOUT 20.0

struct client {
    int socket;
    enum { CONNECTING, ASKED, OPEN, STALLED } state;
    bool stall;        /* never read once it is open */
    uint32_t got;      /* bytes of data frames, in this round */
    uint64_t left;     /* bytes of the payload that is coming in */
    uint8_t have;      /* bytes of the frame header that is coming in */
    uint8_t header[10];
};

static int poller;
static struct client *clients;
static int known, readers;         /* clients in all, those that read */
static const uint8_t *expected;    /* a poll to compare with, or NULL to count only */
static uint32_t expected_size;
static struct epoll_event events[MOST_EVENTS];

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Tells the benchmark what went wrong, which ends its use of this crowd. */
static void fail(const char *format, ...)
{
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (char *letter = text; *letter; letter++)
        if (*letter < ' ' || *letter > '~' || *letter == '"' || *letter == '\\')
            *letter = '?'; /* plain JSON */
    printf("{\"error\": \"%s\"}\n", text);
    fflush(stdout);
    exit(1);
}

static void watch(int action, int number, uint32_t what)
{
    struct epoll_event event = {.events = what, .data.u32 = (uint32_t)number};
    if (epoll_ctl(poller, action, clients[number].socket, &event))
        fail("epoll: %s", strerror(errno));
}

/* Opening */

static void begin(int number, int port, bool stall)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int sock = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (sock < 0)
        fail("socket: %s", strerror(errno));
    if (stall && setsockopt(sock, SOL_SOCKET, SO_RCVBUF, &(int){4096}, sizeof(int)))
        fail("SO_RCVBUF: %s", strerror(errno));
    clients[number] = (struct client){.socket = sock, .state = CONNECTING, .stall = stall};
    if (connect(sock, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS)
        fail("client %d: %s", number + 1, strerror(errno));
    watch(EPOLL_CTL_ADD, number, EPOLLOUT);
}

static void ask(int number)
{
    int error = 0;
    getsockopt(clients[number].socket, SOL_SOCKET, SO_ERROR, &error, &(socklen_t){sizeof error});
    if (error)
        fail("client %d: %s", number + 1, strerror(error));
    if (send(clients[number].socket, REQUEST, sizeof REQUEST - 1, MSG_NOSIGNAL) != sizeof REQUEST - 1)
        fail("client %d could not send its request", number + 1);
    clients[number].state = ASKED;
    watch(EPOLL_CTL_MOD, number, EPOLLIN);
}

/* Takes the head of the answer and nothing behind it; true when it is whole. */
static bool upgraded(int number)
{
    char head[MOST_HEAD + 1];
    ssize_t size = recv(clients[number].socket, head, MOST_HEAD, MSG_PEEK);
    if (size <= 0)
        fail("client %d was hung up on in its handshake", number + 1);
    head[size] = 0;
    char *end = strstr(head, "\r\n\r\n");
    if (!end && size < MOST_HEAD)
        return false;
    if (end)
        end[4] = 0;
    if (!end || strncmp(head, "HTTP/1.1 101 ", 13) || !strstr(head, ACCEPT))
        fail("no handshake: %.60s", head);
    if (recv(clients[number].socket, head, strlen(head), 0) != (ssize_t)strlen(head))
        fail("client %d: the head of its answer changed", number + 1);
    clients[number].state = clients[number].stall ? STALLED : OPEN;
    if (clients[number].stall)
        watch(EPOLL_CTL_DEL, number, 0);
    else
        readers++;
    return true;
}

/* Reading */

static void count(struct client *client, const uint8_t *bytes, size_t size)
{
    if (expected && (client->got + size > expected_size || memcmp(expected + client->got, bytes, size)))
        fail("a client got other bytes, at %u: %.*s", client->got, size > 80 ? 80 : (int)size, (const char *)bytes);
    client->got += (uint32_t)size;
}

/* How many bytes a frame's header has, as far as it is here. */
static unsigned header_size(const struct client *client)
{
    unsigned length = client->have < 2 ? 0 : client->header[1] & 0x7F;
    return length == 127 ? 10 : length == 126 ? 4 : 2;
}

/* The header is whole: a ping is answered and stands in no price, a data frame's bytes count. */
static void frame(struct client *client)
{
    unsigned size = header_size(client);
    client->left = client->header[1] & 0x7F;
    if (size > 2) {
        client->left = 0;
        for (unsigned i = 2; i < size; i++)
            client->left = client->left << 8 | client->header[i];
    }
    client->have = 0;
    if (client->header[0] == 0x89 && client->left == 0) {
        if (send(client->socket, "\x8a\x80\0\0\0\0", 6, MSG_NOSIGNAL) != 6)
            fail("a client could not answer a ping");
    } else if (client->header[0] & 0x08)
        fail("a client got a control frame, %#x", client->header[0]);
    else
        count(client, client->header, size);
}

static void consume(struct client *client, const uint8_t *bytes, size_t size)
{
    while (size) {
        size_t step = client->left < size ? client->left : size;
        if (step) {
            count(client, bytes, step);
            client->left -= step;
        } else {
            step = 1;
            client->header[client->have++] = *bytes;
            if (client->have == header_size(client))
                frame(client);
        }
        bytes += step;
        size -= step;
    }
}

static void receive(int number)
{
    static uint8_t buffer[1 << 16];
    ssize_t size = recv(clients[number].socket, buffer, sizeof buffer, 0);
    if (size < 0 && errno == EAGAIN)
        return;
    if (size <= 0)
        fail("a client was hung up on");
    consume(&clients[number], buffer, (size_t)size);
}

/* One turn of the loop, at most `seconds`; how many events it leaves in `events`. */
static int wait_for_events(double seconds)
{
    int milliseconds = seconds <= 0 ? 0 : seconds > 1000 ? 1000000 : (int)ceil(seconds * 1000);
    int ready = epoll_wait(poller, events, MOST_EVENTS, milliseconds);
    if (ready < 0 && errno != EINTR)
        fail("epoll: %s", strerror(errno));
    return ready < 0 ? 0 : ready;
}

/* What the benchmark tells it to do */

static void connect_clients(int port, int wanted, int in_flight, bool stall)
{
    double start = now();
    int begun = 0, opened = 0;
    clients = realloc(clients, (size_t)(known + wanted) * sizeof *clients);
    if (!clients)
        fail("no memory");
    while (opened < wanted) {
        for (; begun < wanted && begun - opened < in_flight; begun++)
            begin(known++, port, stall);
        int ready = wait_for_events(start + CONNECT_TIMEOUT - now());
        for (int i = 0; i < ready; i++) {
            int number = (int)events[i].data.u32;
            if (clients[number].state == CONNECTING)
                ask(number);
            else if (clients[number].state == ASKED)
                opened += upgraded(number);
            else
                receive(number);
        }
        if (opened < wanted && now() > start + CONNECT_TIMEOUT)
            fail("%d of %d connections in %g s", opened, wanted, CONNECT_TIMEOUT);
    }
    printf("{\"seconds\": %.9f}\n", now() - start);
}

/* Reads until every client got `poll` bytes more: when 99 % of them had, and when the last had. */
static void read_round(uint32_t poll)
{
    double *done = calloc((size_t)readers + 1, sizeof *done);
    int finished = 0;
    if (!done)
        fail("no memory");
    for (int i = 0; i < known; i++)
        clients[i].got = 0;
    puts("{}"); /* ready */
    fflush(stdout);
    double deadline = now() + ROUND_TIMEOUT;
    while (finished < readers) {
        int ready = wait_for_events(deadline - now());
        if (!ready && now() >= deadline)
            fail("%d clients lack bytes after %g s", readers - finished, ROUND_TIMEOUT);
        for (int i = 0; i < ready; i++) {
            struct client *client = &clients[events[i].data.u32];
            uint32_t before = client->got;
            receive((int)events[i].data.u32);
            if (client->got > poll)
                fail("a client got %u bytes too many", client->got - poll);
            if (client->got == poll && before < poll)
                done[finished++] = now();
        }
    }
    double p99 = readers ? done[(int)ceil(readers * 0.99) - 1] : now();
    printf("{\"p99\": %.9f, \"last\": %.9f}\n", p99, readers ? done[readers - 1] : p99);
    free(done);
}

/* Reads on until nothing came for `quiet` seconds, or for `seconds` in all. */
static void drain(double quiet, double seconds)
{
    double deadline = now() + seconds, left;
    while ((left = deadline - now()) > 0) {
        int ready = wait_for_events(quiet < left ? quiet : left);
        if (!ready && quiet < left)
            break;
        for (int i = 0; i < ready; i++)
            receive((int)events[i].data.u32);
    }
    puts("{}");
}

/* The value of a field in one flat line of JSON, as Python writes it. */
static const char *field(const char *line, const char *name)
{
    char key[40];
    snprintf(key, sizeof key, "\"%s\": ", name);
    const char *found = strstr(line, key);
    if (!found)
        fail("no %s in a command", name);
    return found + strlen(key);
}

static void expect(const char *hex)
{
    size_t size = strcspn(hex, "\"") / 2;
    uint8_t *bytes = malloc(size + 1);
    if (!bytes)
        fail("no memory");
    for (size_t i = 0; i < size; i++)
        sscanf(hex + 2 * i, "%2hhx", &bytes[i]);
    expected = bytes;
    expected_size = (uint32_t)size;
}

int main(void)
{
    char *line = NULL;
    size_t room = 0;
    poller = epoll_create1(0);
    while (getline(&line, &room, stdin) > 0) {
        const char *what = field(line, "do");
        if (!strncmp(what, "\"connect\"", 9)) {
            connect_clients(atoi(field(line, "port")), atoi(field(line, "clients")), atoi(field(line, "in_flight")),
                            *field(line, "stall") == 't');
        } else if (!strncmp(what, "\"round\"", 7)) {
            const char *hex = field(line, "expected") + 1;
            if (*hex != '"')
                expect(hex);
            read_round((uint32_t)atoi(field(line, "poll")));
            free((void *)expected);
            expected = NULL;
        } else if (!strncmp(what, "\"drain\"", 7))
            drain(strtod(field(line, "quiet"), NULL), strtod(field(line, "seconds"), NULL));
        else
            fail("unknown command: %.60s", line);
        fflush(stdout);
    }
    return 0;
}
