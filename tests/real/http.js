// An HTTP server that counts the requests of each connection, and of all.
const http = require('http');

let all = 0;
const server = http.createServer((request, response) => {
  request.socket.requests = (request.socket.requests || 0) + 1;
  all += 1;
  const body = `${request.socket.requests} of ${all}`;
  response.writeHead(200, { 'Content-Length': body.length });
  response.end(body);
});
server.keepAliveTimeout = 0;
server.listen(Number(process.argv[2]), '127.0.0.1');
process.on('SIGTERM', () => {
  server.closeAllConnections?.();
  server.close(() => process.exit(0));
});
